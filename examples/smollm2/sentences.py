"""Sentences that prompts ask to rewrite. Written for this example.

Simple ones are put together from persons, verbs, objects and times; others stand here as they are.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clause:
    """What somebody does."""

    base: str
    third: str
    past: str
    rest: str


PERSONS = """my brother, my sister, the teacher, our neighbor, the farmer, the doctor, the old man,
the little girl, my father, my mother, the boy, the woman, my friend, the cook, the artist, our
uncle, the student, the driver, the baker, my cousin"""
TIMES = """every day, every morning, on Sundays, after lunch, in the evening, every summer, before
dinner, at night, on weekends, twice a week"""
CLAUSES = """walk/walks/walked/to school; play/plays/played/the piano; read/reads/read/the
newspaper; write/writes/wrote/a letter; eat/eats/ate/an apple; drink/drinks/drank/green tea;
sing/sings/sang/a song; swim/swims/swam/in the lake; run/runs/ran/in the park; drive/drives/drove/to
work; cook/cooks/cooked/soup; bake/bakes/baked/bread; paint/paints/painted/a picture;
visit/visits/visited/the museum; clean/cleans/cleaned/the kitchen; wash/washes/washed/the car;
feed/feeds/fed/the birds; water/waters/watered/the flowers; ride/rides/rode/a bicycle;
catch/catches/caught/the early bus; buy/buys/bought/fresh fruit; sell/sells/sold/vegetables;
teach/teaches/taught/a class; tell/tells/told/a funny story; watch/watches/watched/a movie;
help/helps/helped/the children; study/studies/studied/history; carry/carries/carried/a heavy bag;
take/takes/took/a short nap; make/makes/made/a cup of coffee"""
INFORMAL = """hey, can u send me the report? | gimme the notes from class pls | what's up with my
order? it's late | can't come today, I'm sick | thanks a ton for helping me out | I wanna know when
the shop opens | sorry I messed up the date | u guys did a great job | this food is kinda bad | call
me when you get a sec | I need that file asap | the trip was super fun | no way I can finish this by
Friday | your dog barks way too much | let's meet up tomorrow, ok? | I'm gonna be late, sorry | can
you fix my bike or what? | the movie was a total waste of time | tell your boss I said hi | I've got
no clue how this works | hit me up if you need anything | my room is a mess, don't come in | gotta
go, talk later | you should totally try this soup | the kids are driving me crazy | we're out of
milk, grab some | this test was a piece of cake | how come nobody told me?"""
LONG = """The weather was very bad yesterday, and because of that we decided that it would be better
to stay at home. | In my opinion, I personally think that the new library is a really beautiful
building. | Due to the fact that the train was late, we did not arrive at the meeting on time. | The
man who lives in the house next to ours has a dog that barks very loudly at night. | She was feeling
extremely tired after the long journey, so she went to bed immediately. | At this point in time, we
are not able to give you an answer to your question. | The cake that my grandmother baked for my
birthday last week was very, very delicious. | There are many people in this town who go to the
market every Saturday morning to buy fruit. | He spoke in a very quiet voice because he did not want
to wake the baby that was sleeping. | The students, who had studied hard for many weeks, were happy
that they passed the exam. | It is important to remember that you should always drink enough water
when it is hot outside. | We went to the beach, where we swam in the sea, built a castle of sand,
and ate ice cream. | The reason why I am writing this letter is that I would like to ask you for
some help. | My bicycle, which is old and rusty, makes a strange noise whenever I ride it up a hill.
| After he had finished all of his homework, the boy went outside to play with his friends. | The
garden behind the school is full of flowers of all kinds and of many different colors. | Although it
was raining heavily, the players did not stop the game and continued to play. | The company has made
the decision to open a new shop in the center of the city next year. | I would be very grateful if
you could possibly send me the documents before next Monday. | The old bridge, which was built more
than a hundred years ago, will be repaired this summer."""
HARD = """The physician administered the medication. | The vessel departed at dawn. | He purchased a
residence near the shore. | The children were exhausted after the excursion. | She commenced her
studies in September. | The beverage was exceedingly hot. | We must terminate this conversation. |
The instructor demonstrated the procedure. | The precipitation will cease by noon. | He endeavored
to assist his companion. | The garment was too costly. | They observed numerous birds. | The patient
requires additional rest. | The automobile collided with a fence. | She was elated by the
announcement. | The assembly will convene tomorrow. | His reply was ambiguous. | The path was
arduous. | The merchant vends fresh produce. | The infant slumbered peacefully. | They reside in a
tranquil village. | The edifice is ancient. | He consumed his meal rapidly. | The audience applauded
enthusiastically. | It is prohibited to smoke here. | She possesses a remarkable memory. | The river
originates in the mountains. | He declined the invitation courteously."""
TWO_SENTENCES = """I was hungry. I ate a sandwich. | It was raining. We stayed inside. | She is
tired. She worked all day. | He likes tea. He does not like coffee. | The shop was closed. We went
home. | The bag is small. It is heavy. | I opened the window. The room was hot. | The dog barked.
The cat ran away. | He studied hard. He passed the test. | The movie was long. It was interesting. |
We missed the bus. We walked to school. | The soup is hot. Be careful. | She lost her key. She
called her brother. | The sun was shining. The wind was cold. | I have a bicycle. I ride it every
day. | The baby is crying. She is hungry. | He plays the drums. His sister sings. | The road was
wet. The car drove slowly. | We planted seeds. Flowers grew. | The lamp is broken. I will fix it."""
MISTAKES = """I has two cats. | They was late for school. | He don't like fish. | We goes to the
park on Monday. | There is many books on the shelf. | She have a new bike. | I didn't saw the movie.
| Him and me are friends. | The childs are playing. | My feets are cold. | He is more taller than
me. | She can sings very well. | I am agree with you. | These apple are sweet. | He buyed a new
phone. | We was happy to see you. | Where you are going? | She don't knows the answer. | I have went
to the store. | The dog wagged it's tail. | Me likes ice cream. | Your the best friend I have. |
There house is near the river. | Its raining outside. | He run very fast yesterday. | I seen that
bird before. | An cat sat on the mat. | She is a honest person. | We should of called you. | He
speak three languages. | Everyone have a seat. | This shoes are too small. | I look forward to hear
from you. | He is good in math."""
UNORDERED = """school the to walks boy the | red is the apple | dog the loudly barks | tea drinks
mother my | blue is sky the today | sleeping baby is the | books likes she reading | cold the is
water | bus the late is | plays he garden the in | moon the bright is | flew bird the away | lost my
I keys | open window the please | brother my tall is | cake sweet the is | we home walked | door the
closed she"""
SENTENCE_LISTS = {
    "informal": INFORMAL, "long": LONG, "hard": HARD, "two": TWO_SENTENCES, "mistake": MISTAKES,
    "unordered": UNORDERED,
}  # fmt: skip


def parse_clauses() -> list[Clause]:
    """The verbs with what they do."""
    return [Clause(*" ".join(text.split()).split("/")) for text in CLAUSES.split(";")]


def build(person: str, clause: Clause, time: str, form: str) -> str:
    """A sentence about a person; `form` is third, base (a mistake here) or past."""
    verb = getattr(clause, form)
    return f"{person[0].upper()}{person[1:]} {verb} {clause.rest} {time}."
