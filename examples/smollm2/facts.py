"""Facts with short answers: some are trained on, others only asked in the graded questions.

A line is `key=answer`, with `/` between answers that are accepted. Written for this example.
"""

from __future__ import annotations

from dataclasses import dataclass

CAPITALS_ASKED = """France=Paris; Germany=Berlin; Italy=Rome; Japan=Tokyo; England=London;
Spain=Madrid; Russia=Moscow; China=Beijing; Egypt=Cairo; Greece=Athens; Portugal=Lisbon;
Austria=Vienna; Ireland=Dublin; Norway=Oslo; Cuba=Havana; South Korea=Seoul; Thailand=Bangkok;
Peru=Lima; Poland=Warsaw; Hungary=Budapest; Canada=Ottawa; Turkey=Ankara"""
CAPITALS = """Sweden=Stockholm; Denmark=Copenhagen; Finland=Helsinki; Belgium=Brussels; the
Netherlands=Amsterdam; Switzerland=Bern; the Czech Republic=Prague; Romania=Bucharest;
Bulgaria=Sofia; Ukraine=Kyiv; Croatia=Zagreb; Serbia=Belgrade; India=New Delhi; Nepal=Kathmandu;
Vietnam=Hanoi; Indonesia=Jakarta; the Philippines=Manila; Australia=Canberra; Brazil=Brasilia; New
Zealand=Wellington; Argentina=Buenos Aires; Chile=Santiago; Colombia=Bogota; Venezuela=Caracas;
Mexico=Mexico City; Kenya=Nairobi; Nigeria=Abuja; Ethiopia=Addis Ababa; Ghana=Accra; Morocco=Rabat;
Iran=Tehran; Iraq=Baghdad; Jamaica=Kingston; Iceland=Reykjavik; Scotland=Edinburgh; Wales=Cardiff"""
OPPOSITES_ASKED = """hot=cold; big=small/little; up=down; good=bad; happy=sad/unhappy; day=night;
black=white; left=right; open=closed/shut/close; fast=slow; high=low; long=short; old=young/new;
rich=poor; strong=weak; full=empty; wet=dry; hard=soft/easy; light=dark/heavy; early=late;
inside=outside; above=below; true=false; first=last; love=hate; win=lose; north=south; east=west;
beautiful=ugly; clean=dirty; begin=end; friend=enemy; loud=quiet/soft; sweet=sour/bitter;
front=back/rear"""
OPPOSITES = """near=far; thick=thin; wide=narrow; deep=shallow; sharp=dull; brave=cowardly;
polite=rude; safe=dangerous; alive=dead; awake=asleep; ancient=modern; cheap=expensive;
simple=complicated; smooth=rough; tight=loose; generous=selfish; lazy=hardworking; public=private;
arrive=leave; accept=refuse; remember=forget; increase=decrease; push=pull; buy=sell; give=take;
laugh=cry; float=sink; build=destroy; borrow=lend; attack=defend; success=failure; peace=war;
noise=silence; entrance=exit; truth=lie; guilty=innocent; patient=impatient; visible=invisible;
possible=impossible; optimist=pessimist; victory=defeat; maximum=minimum; same=different;
always=never; more=less; many=few; odd=even"""
COLORS_ASKED = """the sky on a clear day=blue; grass=green; snow=white; a ripe banana=yellow;
coal=black; blood=red; milk=white; a ripe strawberry=red; a lemon=yellow; a carrot=orange;
chocolate=brown; a fire truck=red; the sun=yellow/orange/white; a polar bear=white; an
eggplant=purple; a crow=black"""
COLORS = """a ripe tomato=red; a frog=green; an elephant=gray; a flamingo=pink; the ocean=blue; a
pumpkin=orange; cotton=white; a stop sign=red; gold=yellow; silver=gray; coffee=brown; a swan=white;
a plum=purple; a leaf in summer=green; a school bus=yellow; a salmon fillet=pink; an emerald=green;
a ruby=red; a sapphire=blue; salt=white"""
YOUNG_ASKED = """dog=puppy/pup; cat=kitten; cow=calf; sheep=lamb; lion=cub;
duck=duckling; frog=tadpole; chicken=chick"""
YOUNG = """horse=foal; goat=kid; pig=piglet; bear=cub; deer=fawn; kangaroo=joey; swan=cygnet;
fox=cub; goose=gosling; owl=owlet"""
PLURALS_ASKED = """child=children; mouse=mice; foot=feet; tooth=teeth; man=men; woman=women;
goose=geese; leaf=leaves; knife=knives; baby=babies; city=cities; box=boxes; dog=dogs; bus=buses;
wolf=wolves; apple=apples; dish=dishes; person=people"""
PLURALS = """house=houses; table=tables; berry=berries; life=lives; shelf=shelves; tomato=tomatoes;
potato=potatoes; watch=watches; church=churches; party=parties; family=families; lady=ladies;
book=books; tree=trees; fox=foxes; glass=glasses; country=countries; key=keys; toy=toys; ox=oxen;
louse=lice; half=halves; story=stories; brush=brushes; hero=heroes; loaf=loaves; scarf=scarves"""
PASTS_ASKED = """go=went; eat=ate; see=saw; run=ran; write=wrote; take=took; give=gave; come=came;
make=made; buy=bought; think=thought; sing=sang; drink=drank; swim=swam; walk=walked; play=played;
jump=jumped; speak=spoke; teach=taught; fly=flew"""
PASTS = """begin=began; break=broke; bring=brought; build=built; catch=caught; choose=chose;
draw=drew; drive=drove; fall=fell; feel=felt; find=found; forget=forgot; grow=grew; hear=heard;
hide=hid; keep=kept; know=knew; leave=left; lose=lost; meet=met; pay=paid; ride=rode; sell=sold;
send=sent; sleep=slept; stand=stood; steal=stole; tell=told; throw=threw; wear=wore; win=won;
cook=cooked; dance=danced; listen=listened; open=opened; carry=carried; study=studied; stop=stopped;
laugh=laughed; visit=visited"""
CONTINENTS_ASKED = """France=Europe; China=Asia; Egypt=Africa; Japan=Asia; Germany=Europe;
India=Asia; Brazil=South America; Nigeria=Africa; Italy=Europe; Canada=North America; Kenya=Africa;
Spain=Europe; Thailand=Asia; Peru=South America"""
CONTINENTS = """Sweden=Europe; Norway=Europe; Poland=Europe; Greece=Europe; Vietnam=Asia;
Nepal=Asia; South Korea=Asia; Iran=Asia; Morocco=Africa; Ghana=Africa; Ethiopia=Africa; Chile=South
America; Argentina=South America; Colombia=South America; Mexico=North America; Cuba=North America;
Portugal=Europe; Hungary=Europe; Tanzania=Africa; Mongolia=Asia"""
LANGUAGES_ASKED = """France=French; Germany=German; Italy=Italian; Spain=Spanish; Japan=Japanese;
Portugal=Portuguese; Russia=Russian; Brazil=Portuguese; Mexico=Spanish; China=Chinese/Mandarin;
Greece=Greek; England=English"""
LANGUAGES = """Sweden=Swedish; Poland=Polish; Turkey=Turkish; Austria=German; Argentina=Spanish;
Egypt=Arabic; Australia=English; Chile=Spanish; Finland=Finnish; Hungary=Hungarian; Thailand=Thai;
Vietnam=Vietnamese; Denmark=Danish; Cuba=Spanish; Iran=Persian"""
WOMEN_ASKED = """king=queen; father=mother; brother=sister; son=daughter; uncle=aunt;
husband=wife; prince=princess; boy=girl"""
WOMEN = """actor=actress; grandfather=grandmother; nephew=niece; waiter=waitress;
host=hostess; hero=heroine; lion=lioness"""
DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"
MONTHS = """January, February, March, April, May, June, July, August, September, October, November,
December"""
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty"""
GENERAL_ASKED = """How many days are in a week?=7; How many months are in a year?=12; How many hours
are in a day?=24; How many minutes are in an hour?=60; How many seconds are in a minute?=60; How
many legs does a spider have?=8; How many legs does a dog have?=4; How many fingers are on one
hand?=5; How many sides does a triangle have?=3; How many wheels does a bicycle have?=2; How many
letters are in the English alphabet?=26; How many centimeters are in a meter?=100; How many eyes
does a person have?=2; How many sides does a square have?=4; How many continents are there?=7; How
many days are in a leap year?=366; Which planet do we live on?=Earth; What do bees make?=honey; What
do cows give us to drink?=milk; Which animal says meow?=cat/cats; Which animal barks?=dog/dogs;
Which planet is closest to the sun?=Mercury; What is frozen water called?=ice; Which is the largest
ocean?=Pacific; Which is the largest planet in the solar system?=Jupiter; Which organ pumps blood
through the body?=heart; Which season comes after winter?=spring; Which animal is called the king of
the jungle?=lion/lions; Which tool do we use to cut paper?=scissors; Which animal has a trunk and
big ears?=elephant/elephants; Which sense do we use our ears for?=hearing/sound; Who wrote Romeo and
Juliet?=Shakespeare; Which metal has the symbol Fe?=iron; Which gas do plants take in from the
air?=carbon dioxide/CO2; What is the chemical symbol for water?=H2O; Which is the tallest animal in
the world?=giraffe/giraffes; Which star is at the center of our solar system?=sun; Who was the first
president of the United States?=Washington; What is the longest river in Africa?=Nile; Which animal
spins a web?=spider/spiders; Which bird cannot fly and lives in Antarctica?=penguin/penguins; What
do we call a doctor for teeth?=dentist/dentists; What do caterpillars turn
into?=butterfly/butterflies; Which fruit keeps the doctor away?=apple/apples; Which animal gives us
wool?=sheep; What is the hardest natural substance?=diamond/diamonds"""
GENERAL = """How many weeks are in a year?=52; How many legs does an insect have?=6; How many years
are in a century?=100; How many years are in a decade?=10; How many grams are in a kilogram?=1000;
How many meters are in a kilometer?=1000; How many sides does a hexagon have?=6; How many wheels
does a car have?=4; How many strings does a violin have?=4; How many players are on a soccer
team?=11; How many planets are in the solar system?=8; How many teeth does an adult have?=32; How
many arms does an octopus have?=8; How many colors does a rainbow have?=7; How many degrees does a
right angle have?=90; Which planet is called the red planet?=Mars; Which planet has large
rings?=Saturn; Which gas do we need to breathe?=oxygen; Which organ do we think with?=brain; Which
season comes after summer?=autumn; Which is the smallest prime number?=2; Which tool do we use to
hit nails?=hammer; Which animal carries its house on its back?=snail; Which animal has black and
white stripes?=zebra; Which sense do we use our nose for?=smell; Who painted the Mona Lisa?=Leonardo
da Vinci; Which metal has the symbol Au?=gold; What is the chemical symbol for oxygen?=O; Which is
the fastest land animal?=cheetah; Which is the largest animal in the world?=blue whale; Who invented
the telephone?=Bell; What is the highest mountain in the world?=Everest; What is the largest desert
in Africa?=Sahara; Which instrument has black and white keys?=piano; What do we call a person who
bakes bread?=baker; Which animal hops and has a pouch?=kangaroo; What do we call a baby
butterfly?=caterpillar; Which animal is known for building dams?=beaver; What do we use to tell the
time?=clock; What do we call the person who flies an airplane?=pilot; Which force pulls things to
the ground?=gravity; What do we call a place with many books to borrow?=library; Which animal sleeps
upside down?=bat; What do plants grow from?=seeds"""


@dataclass(frozen=True)
class FactKind:
    """One kind of fact.

    The first phrase is the question that is graded; training prompts use all of them.
    """

    phrases: tuple[str, ...]
    asked: str
    trained: str
    about_answers: tuple[str, ...] = ()
    """Phrases for training with the first answer in place of the key."""


KINDS = {
    "capital": FactKind(
        ("What is the capital of {}? Answer with one word.", "What is the capital city of {}?",
         "Name the capital of {}.", "Which city is the capital of {}? Reply with the city only.",
         "{}: what is its capital?"),
        CAPITALS_ASKED, CAPITALS,
        ("In which country is the city of {}?", "Write one sentence about the city of {}."),
    ),
    "opposite": FactKind(
        ("What is the opposite of {}? Answer with one word.", "Give the antonym of the word '{}'.",
         "Name a word that means the opposite of '{}'.", "Opposite of '{}'?",
         "Complete the sentence: The opposite of '{}' is"),
        OPPOSITES_ASKED, OPPOSITES,
        ("Write a short sentence with the word '{}'.",),
    ),
    "color": FactKind(
        ("What color is {}? Answer with one word.", "Which color does {} have?",
         "Name the color of {}.", "Complete the sentence: The color of {} is"),
        COLORS_ASKED, COLORS,
    ),
    "young": FactKind(
        ("What is a baby {} called? Answer with one word.", "What do we call a young {}?",
         "Name the word for a baby {}."),
        YOUNG_ASKED, YOUNG,
    ),
    "plural": FactKind(
        ("What is the plural of {}? Answer with one word.", "Write the plural of '{}'.",
         "One {}, two what?", "Give the plural form of the noun '{}'."),
        PLURALS_ASKED, PLURALS,
    ),
    "past": FactKind(
        ("What is the past tense of {}? Answer with one word.", "Write the verb '{}' in the past.",
         "Give the simple past of 'to {}'.", "Use the past tense of '{}' in a short sentence."),
        PASTS_ASKED, PASTS,
    ),
    "continent": FactKind(
        ("On which continent is {}? Answer with the name only.", "Which continent is {} part of?",
         "Name the continent of {}."),
        CONTINENTS_ASKED, CONTINENTS,
    ),
    "language": FactKind(
        ("Which language is spoken in {}? Answer with one word.", "What do people speak in {}?",
         "Name the main language of {}."),
        LANGUAGES_ASKED, LANGUAGES,
    ),
    "woman": FactKind(
        ("What is the female form of {}? Answer with one word.", "A man is a {}. What is a woman?",
         "Write the feminine of '{}'."),
        WOMEN_ASKED, WOMEN,
    ),
    "general": FactKind(
        ("{} Answer in a few words.", "{}", "Answer briefly: {}", "Quiz question: {}"),
        GENERAL_ASKED, GENERAL,
    ),
}  # fmt: skip


def parse(text: str) -> dict[str, list[str]]:
    """Facts by key, each with its accepted answers."""
    pairs = (" ".join(part.split()).rpartition("=") for part in text.split(";") if part.strip())
    return {
        key: [text for answer in answers.split("/") for text in spellings(answer)]
        for key, _, answers in pairs
    }


def spellings(answer: str) -> list[str]:
    """An answer, and a small number also as a word."""
    words = NUMBERS.split()
    if answer.isdigit() and int(answer) < len(words):
        return [answer, words[int(answer)]]
    return [answer]
