"""Words and sentences from which prompts are made. Written for this example.

Lists are texts with commas or lines between their items; `LISTS` has them by slot name.
"""

from __future__ import annotations

ANIMALS = """dog, cat, horse, cow, sheep, goat, pig, rabbit, fox, wolf, bear, lion, tiger, elephant,
giraffe, zebra, monkey, camel, kangaroo, koala, penguin, owl, eagle, parrot, duck, swan, frog,
snake, turtle, crocodile, shark, dolphin, whale, octopus, crab, bee, ant, spider, butterfly, snail,
bat, mouse, squirrel, hedgehog, deer, otter, seal, beaver, peacock, salmon"""
FOODS = """bread, rice, pasta, pizza, soup, salad, cheese, yogurt, butter, pancakes, sandwiches,
eggs, fish, chicken, beans, potatoes, tomatoes, carrots, onions, spinach, mushrooms, apples,
bananas, oranges, grapes, strawberries, lemons, peaches, pears, watermelon, honey, chocolate, ice
cream, cookies, cake, nuts, oatmeal, noodles, corn, cucumbers, pumpkins, cherries"""
JOBS = """teacher, doctor, nurse, farmer, baker, chef, pilot, firefighter, police officer, lawyer,
judge, engineer, architect, carpenter, plumber, electrician, mechanic, gardener, painter, musician,
actor, writer, journalist, librarian, dentist, vet, scientist, astronaut, sailor, tailor,
photographer, waiter, cashier, barber, postman, bus driver, lifeguard, translator"""
PLACES = """beach, park, library, museum, school, hospital, airport, train station, market, bakery,
restaurant, farm, forest, desert, mountain, river, lake, island, village, city, garden, zoo, castle,
theater, stadium, bank, hotel, post office, factory, playground, supermarket, lighthouse, harbor,
bookshop, campsite"""
OBJECTS = """pencil, notebook, umbrella, chair, table, lamp, clock, mirror, pillow, blanket, spoon,
knife, cup, plate, bottle, basket, bucket, broom, hammer, ladder, rope, candle, key, lock, door,
window, bicycle, car, boat, kite, ball, drum, camera, telephone, radio, computer, backpack, wallet,
hat, coat, scarf, belt, toothbrush, towel, map, flashlight, stapler, ruler, compass, telescope,
microscope, thermometer, calculator, envelope, refrigerator, oven, kettle"""
TOPICS = """gravity, photosynthesis, the water cycle, electricity, magnetism, sound, light, heat,
friction, evaporation, erosion, a rainbow, lightning, thunder, an earthquake, a volcano, a
hurricane, a tornado, the seasons, day and night, the tides, an eclipse, the solar system, a comet,
a black hole, a galaxy, an atom, a molecule, a cell, DNA, evolution, a fossil, a virus, bacteria,
vaccines, digestion, breathing, the heart, the brain, sleep, exercise, a healthy diet, recycling,
pollution, climate change, solar energy, wind power, the internet, email, a computer program,
artificial intelligence, a robot, a bank account, money, a tax, democracy, a law, an election, a
constitution, a map, a calendar, history, geography, poetry, a novel, a fable, music, a melody,
painting, sculpture, theater, friendship, honesty, courage, patience, kindness, teamwork, a budget,
a promise, time, an ecosystem, a food chain, migration, hibernation, camouflage, pollination, a
glacier, a desert, a rainforest, a coral reef"""
HOBBIES = """reading, writing, painting, drawing, cooking, baking, gardening, fishing, hiking,
camping, cycling, running, swimming, dancing, singing, playing the piano, playing the guitar,
playing chess, photography, knitting, sewing, bird watching, stargazing, collecting stamps, yoga,
skiing, skating, sailing, climbing, pottery, woodworking, volunteering, learning a language,
juggling"""
GOALS = """sleep better, wake up early, save money, eat more vegetables, drink more water, learn
faster, remember names, stay focused, make new friends, prepare for a test, speak in public, write a
good letter, keep a room tidy, calm down, stay healthy, use less plastic, save energy at home, read
more books, learn to swim, train for a race, plan a trip, pack a suitcase, find a job, take care of
a dog, grow tomatoes, bake bread, clean a kitchen, be a good listener, say sorry, make a budget,
cook rice, improve my handwriting, overcome shyness, organize my day, take better photos, protect my
eyes, stay warm in winter"""
FEELINGS = """happy, sad, angry, afraid, proud, lonely, nervous, excited, bored, tired, grateful,
jealous, surprised, confused, hopeful, curious, calm, worried, shy, brave"""
NAMES = """Anna, Ben, Clara, David, Ella, Felix, Grace, Henry, Iris, Jack, Kate, Leo, Maria, Noah,
Olivia, Peter, Rosa, Sam, Tina, Victor, Wendy, Yusuf, Zara, Omar, Lucy, Nina, Paul, Emma, Carlos,
Mei"""
NOUNS_DEFINED = """courage, wisdom, a habit, a rumor, a proverb, a shadow, an echo, a mistake, a
secret, a journey, a tradition, a festival, a neighbor, a hero, a leader, a guest, a stranger, a
bargain, a recipe, a diary, a riddle, a puzzle, a melody, a voyage, a harvest, a drought, a flood, a
bridge, a tunnel, a canal, a desert, a valley, a peninsula, a volcano, a planet, a satellite, an
orphan, a nephew, a vegetarian, an insect, a mammal, a reptile, a synonym, a verb, an adjective, a
triangle, a fraction"""
THEMES = """the sea, autumn, spring, the moon, rain, snow, a lost key, a brave mouse, a sleepy bear,
a kind giant, an old tree, a red balloon, a small boat, a broken clock, a talking parrot, a long
train ride, a rainy day, a birthday party, a new friend, a magic pencil, a hungry wolf, a quiet
village, a dark cave, a shooting star, a lost puppy, a secret garden, a snowman, a wise owl, a paper
plane, a lighthouse keeper, a clever fox, a friendly ghost, a garden in bloom, a stormy night, the
first day of school"""
THINGS_LISTED = """fruits, vegetables, colors, farm animals, wild animals, birds, insects, musical
instruments, sports, board games, kitchen tools, pieces of furniture, clothes, school subjects,
jobs, means of transport, parts of the body, flowers, trees, planets, countries in Europe, countries
in Asia, languages, large cities, oceans, rivers, drinks, desserts, spices, breakfast foods, shapes,
feelings, hobbies, things in a classroom, things in a bathroom, things that are round, things that
are cold, things that are soft, things made of wood, things made of glass, winter sports, water
animals, tools, metals, pets, inventions, holidays"""
WHY = """the sky is blue, leaves change color in autumn, we need sleep, ice floats on water, birds
fly south in winter, plants need sunlight, the moon seems to change its shape, we see lightning
before we hear thunder, people wear sunglasses, cats purr, dogs wag their tails, bees make honey,
camels have humps, the sea is salty, we have leap years, metal feels cold, bread rises, onions make
us cry, we yawn, people recycle, trees are important, children need to play, we brush our teeth,
fish have gills, owls hunt at night, snow is white, balloons float, iron rusts, hands should be
washed, exercise is good for us, people use maps, ships float, wood burns, stars twinkle, deserts
are dry, leaves are green, milk goes bad, glass breaks easily"""
PAIRS = """a cat and a dog | a lake and a river | a city and a village | the sun and the moon | tea
and coffee | a bus and a train | a frog and a toad | a poem and a story | a doctor and a nurse | a
bicycle and a motorcycle | an island and a continent | summer and winter | a novel and a newspaper |
a whale and a fish | butter and cheese | a violin and a guitar | a hill and a mountain | ice and
steam | a moth and a butterfly | a teacher and a student | an alligator and a crocodile | a planet
and a star | a fruit and a vegetable | gold and silver | a letter and an email | a king and a
president | a house and an apartment | running and walking | weather and climate | a rabbit and a
hare | wood and metal | a pen and a pencil | a square and a rectangle | an ocean and a sea | a wolf
and a dog | honey and sugar | an airplane and a helicopter | a museum and a library | rice and pasta
| a breeze and a storm"""
LISTS = {
    "animal": ANIMALS, "food": FOODS, "job": JOBS, "place": PLACES, "object": OBJECTS,
    "topic": TOPICS, "hobby": HOBBIES, "goal": GOALS, "feeling": FEELINGS, "name": NAMES,
    "noun": NOUNS_DEFINED, "theme": THEMES, "things": THINGS_LISTED, "why": WHY, "pair": PAIRS,
}  # fmt: skip


def split_list(text: str) -> list[str]:
    """Items of a list, each once, in order."""
    separator = "|" if "|" in text else ","
    items = (" ".join(item.split()) for item in text.split(separator))
    return list(dict.fromkeys(item for item in items if item))
