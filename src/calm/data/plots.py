"""Plots of the embedded corpus: a plot is a list of beats, a beat a list of sentences to choose from.

Slots in braces are filled by `calm.data.stories`; a slot keeps its value through a story. Slots of
the hero: {hero} {he} {him} {his} {He} {His}; of the friend: {friend} {they} {them} {their} {They}.
"""

Beats = list[list[str]]

OPENINGS = [
    "Once upon a time there was a {mood} {child} named {hero}.",
    "Once there lived a {mood} {child} called {hero} in the town of {town}.",
    "{hero} was a {mood} {child} who lived near the {place}.",
    "In the town of {town} there lived a {child} named {hero}.",
    "There was once a {child} named {hero} who loved {food}.",
    "One {weather} {time}, a {mood} {child} named {hero} woke up early.",
]

ENDINGS = [
    "{hero} went to bed {mood2} that night.",
    "From that day on, {hero} and {friend} were the best of friends.",
    "And {hero} never forgot that {weather} {day}.",
    "It was the best {day} of the whole year.",
    'That night {hero} smiled and said, "What a {weather} and wonderful day!"',
    "And everyone in {town} still tells the story of {hero} and the {look} {thing}.",
    "They all had {food} for supper, and everybody was {mood2}.",
]

LOST_PET: Beats = [
    [
        "{He} had a {color} {animal} named {pet}.",
        "{His} best friend was a {color} {animal} called {pet}.",
    ],
    [
        "Every {time} {hero} and {pet} went to the {place} together.",
        "{pet} the {animal} loved to play near the {place}.",
        "{hero} gave {pet} some {food} every {time}.",
    ],
    [
        "One {day}, {pet} was gone.",
        "But one {weather} {day} {hero} could not find {pet} anywhere.",
        "One {day} there was a loud {sound}, and {pet} ran away.",
    ],
    [
        "{hero} looked behind the {place}, but {pet} was not there.",
        "{hero} called and called, but the {animal} did not come.",
        '"{pet}, where are you?" cried {hero}.',
    ],
    [
        "{He} felt very sad.",
        "{hero} sat down under the {tree} tree and began to cry.",
        "{He} was worried and did not want to eat any {food}.",
    ],
    [
        "Then {friend} the {job} came along the street.",
        "Just then {friend}, who was a {job}, stopped beside {him}.",
    ],
    [
        '"Why are you so sad?" asked {friend}. "I have lost my {animal}," said {hero}.',
        '"What is wrong?" {friend} asked {adverb}. "{pet} is gone," said {hero}.',
    ],
    [
        '"I saw a {color} {animal} near the {place2}," said {friend}.',
        '"Let us look near the {place2} together," said {friend}.',
    ],
    [
        "They walked {adverb} to the {place2}.",
        "{hero} and {friend} ran to the {place2} as fast as they could.",
    ],
    [
        "There sat {pet}, eating {food2} beside a {look} {thing}.",
        "And there was {pet}, asleep under a {look} {thing}.",
        "Behind a {look} {thing} they found {pet}, wet and {mood2}.",
    ],
    [
        "{hero} hugged the {animal} and laughed.",
        '"Oh {pet}, I missed you so much!" said {hero}.',
        "{hero} thanked {friend} and carried {pet} home.",
    ],
]

BIRTHDAY: Beats = [
    [
        "It was the birthday of {his} {relative}.",
        "Soon it would be the birthday of {his} {relative}.",
        "Next {day} was the birthday of {his} {relative}.",
    ],
    [
        "{hero} wanted to give {his} {relative} a {color} {thing}.",
        '"I will find a {color} {thing} for my {relative}," said {hero}.',
    ],
    [
        "But {hero} had only {number} coins.",
        "{He} counted {his} coins and there were only {number}.",
    ],
    [
        "So {he} went to the {place} to look for one.",
        "{hero} walked {adverb} to the shop near the {place}.",
    ],
    [
        "There {he} met {friend} the {job}.",
        "An old {job} named {friend} stood at the door.",
    ],
    [
        '"Do you have a {color} {thing}?" asked {hero}.',
        '"Please, I am looking for a {color} {thing}," said {hero} {adverb}.',
    ],
    [
        '"Yes, but it costs more than {number} coins," said {friend}.',
        '"I do," said {friend}, "but {number} coins are not enough."',
    ],
    [
        '"If you help me carry the {food2}, the {thing} is yours," said {friend}.',
        '"Help me to clean the {place2} today, and you may have it," said {friend}.',
    ],
    [
        "{hero} worked until {time} and did not stop once.",
        "So {hero} worked hard for {number} hours.",
        "{hero} helped {adverb}, and {friend} was very pleased.",
    ],
    [
        "Then {friend} gave {him} the {color} {thing}, wrapped in paper.",
        "At {time} {friend} put the {color} {thing} in a {look} {thing2} and gave it to {him}.",
    ],
    [
        '"This is the best gift in the world," said {his} {relative}.',
        "When {his} {relative} saw the {color} {thing}, there were tears of joy.",
        '{His} {relative} opened the gift and said, "A {color} {thing}! Thank you, {hero}!"',
    ],
]

BROKEN: Beats = [
    [
        "{hero} had a {look} {thing} that {his} {relative} had made.",
        "{His} {relative} had a {look} {thing} that was very old.",
        "The {look} {thing} stood in the {place} for {number} years.",
    ],
    [
        "One {time}, {hero} dropped the {thing} with a loud {sound}.",
        "One {day} the {thing} fell down with a {sound} and broke.",
    ],
    [
        '"Oh no!" said {hero}. "The {thing} is broken!"',
        "{hero} looked at the broken {thing} and felt {mood2}.",
    ],
    [
        "{He} hid the {thing} under the {tree} tree.",
        "{He} put the pieces into a {color} {thing2}.",
    ],
    [
        "But {he} could not sleep that night.",
        "But the secret made {him} feel very heavy.",
    ],
    [
        "In the {time} {he} told {friend} about it.",
        "The next {day} {hero} met {friend} at the {place2}.",
    ],
    [
        '"You must tell your {relative} the truth," said {friend}.',
        '"Let us ask the {job} for help," said {friend}.',
    ],
    [
        "Together they took the {thing} to the {job}.",
        "They carried the {color} {thing2} to the house of the {job}.",
    ],
    [
        "The {job} worked {adverb} with glue and string.",
        "The {job} looked at the {thing} and nodded {adverb}.",
    ],
    [
        "Soon the {thing} was as good as new.",
        "After {number} hours the {thing} was whole again.",
    ],
    [
        'Then {hero} told {his} {relative} everything. "I am sorry," {he} said.',
        '"I broke the {thing}, and I am sorry," {hero} told {his} {relative}.',
    ],
    [
        '"Thank you for telling the truth," said {his} {relative}.',
        "{His} {relative} was not angry and gave {him} a hug.",
    ],
]

STORM: Beats = [
    [
        "It was a {weather} {time} in {month}.",
        "The {time} was {weather}, and the sky grew dark over {town}.",
    ],
    [
        "{hero} was at the {place} with {friend}.",
        "{hero} and {friend} were playing with a {color} {thing} near the {place}.",
    ],
    [
        "Suddenly the wind began to {sound} and the rain came down.",
        "Then they heard a {sound} far away, and a storm began.",
    ],
    [
        '"We must go home!" said {friend}.',
        '"Quick, run to the {place2}!" shouted {hero}.',
    ],
    [
        "But the bridge was gone, and the water was rising.",
        "But a big {tree} tree had fallen across the road.",
    ],
    [
        "They hid in the {place2} and waited.",
        "They found an old {place2} and closed the door.",
    ],
    [
        "Inside it was dark, but {hero} had a {look} {thing2}.",
        "{friend} was {mood2}, so {hero} told a story about a {animal}.",
        "They shared the last {food} and listened to the rain.",
    ],
    [
        "Something went {sound} in the corner.",
        "All at once there was a {sound} behind the wall.",
    ],
    [
        "It was only a {color} {animal}, cold and afraid.",
        "A little {animal} came out and looked at them.",
    ],
    [
        "{hero} gave the {animal} some {food}.",
        '"Do not be afraid," {hero} said {adverb} to the {animal}.',
    ],
    [
        "At {time} the storm was over, and the sun came out.",
        "After {number} hours the rain stopped, and the sky was blue again.",
    ],
    [
        "Their families were glad to see them, and the {animal} stayed with {hero}.",
        "They walked home {adverb}, and the {animal} came too.",
    ],
]

GARDEN: Beats = [
    [
        "{hero} had a small garden behind the {place}.",
        "In the spring {hero} planted {flower} behind the house.",
    ],
    [
        "{He} grew {flower} and {food} there.",
        "The {flower} were {color}, and the {food} were sweet.",
    ],
    [
        "In {month} there was a contest in {town}.",
        "Every {month} the town of {town} held a garden contest.",
    ],
    [
        '"I want to win the {look} {thing}," said {hero}.',
        "The prize was a {look} {thing}.",
    ],
    [
        "But a {animal} came every {time} and ate the {food}.",
        "But one {time} {hero} saw that a {animal} had eaten the {flower}.",
    ],
    [
        "{hero} was angry and built a fence.",
        '"Go away!" shouted {hero}, but the {animal} only looked at {him}.',
    ],
    [
        '"Maybe the {animal} is hungry," said {friend}.',
        '{friend} said, "It has {number} babies under the {tree} tree."',
    ],
    [
        "They followed the {animal} to the {tree} tree and saw {number} babies.",
        "Under the {tree} tree there were {number} tiny {animal} babies.",
    ],
    [
        "From then on {hero} left some {food} beside the {tree} tree.",
        "So {hero} and {friend} put a bowl of {food2} under the {tree} tree.",
    ],
    [
        "The {animal} did not touch the {flower} again.",
        "After that the {flower} grew taller than ever.",
    ],
    [
        "On {day} the judge gave {hero} the {look} {thing}.",
        "{hero} did not win the {look} {thing}, but {he} had made a new friend.",
        'The judge said, "These {color} {flower} are the finest in {town}!"',
    ],
]

NEIGHBOR: Beats = [
    [
        "A new family moved into the {color} house near the {place}.",
        "One {day} {number} wagons stopped in front of the {color} house.",
    ],
    [
        "There was a {friend_child} named {friend}, who was very {mood2}.",
        "{hero} saw a {friend_child} named {friend} sitting alone on the stairs.",
    ],
    [
        "{friend} did not know anybody in {town}.",
        "{friend} came from a place far away and missed {their} old home.",
    ],
    [
        '"Would you like to play with my {thing}?" asked {hero}.',
        'So {hero} took {his} {look} {thing} and said, "Hello, I am {hero}."',
    ],
    [
        "{friend} only shook {their} head.",
        "{friend} looked away and said nothing.",
    ],
    [
        "The next {time} {hero} brought some {food}.",
        "On {day} {hero} came back with warm {food}.",
    ],
    [
        '"{food} are my favorite," whispered {friend}.',
        '{friend} smiled and said, "At home we always ate {food} with {food2}."',
    ],
    [
        "They sat under the {tree} tree and ate all of it.",
        "They shared the {food} and talked until {time}.",
    ],
    [
        "{friend} showed {hero} a {color} {thing2} from far away.",
        "Then {friend} took out a {color} {thing2} and taught {hero} a game.",
    ],
    [
        "After that they went to the {place2} every {day}.",
        "They played at the {place2} until it was dark.",
    ],
]

MARKET: Beats = [
    [
        "{His} {relative} gave {him} {number} coins to buy {food}.",
        '"Please buy {food} at the market," said {his} {relative}.',
    ],
    [
        "{hero} took a {look} {thing} and went to {town}.",
        "On the way to the market {hero} walked past the {place}.",
    ],
    [
        "There {he} met a {job} with a {color} {animal}.",
        "At the {place} a {job} was selling a {color} {animal}.",
    ],
    [
        '"Give me {number} coins and this {animal} is yours," said the {job}.',
        "The {animal} looked so sad that {hero} stopped.",
    ],
    [
        "{hero} forgot the {food} and paid the {job}.",
        '"I will take the {animal} home," said {hero}, and {he} gave away all the coins.',
    ],
    [
        "At home {his} {relative} was not pleased.",
        '"Where is the {food}?" asked {his} {relative}.',
    ],
    [
        '"We cannot eat a {animal}!" said {his} {relative}.',
        "{hero} had no {food}, only a {mood2} {animal}.",
    ],
    [
        "That night a thief came to the house with a {sound}.",
        "At midnight there was a {sound} at the door.",
    ],
    [
        "The {animal} made so much noise that the thief ran away.",
        "The {animal} woke up everybody, and the thief dropped a {look} {thing2} and ran.",
    ],
    [
        '"This is a very good {animal}," said {his} {relative} {adverb}.',
        '"You were right, {hero}," said {his} {relative}.',
    ],
    [
        "They named the {animal} {pet} and gave it the best {food2}.",
        "From then on the {animal} was called {pet} and slept beside the stove.",
    ],
]

TREASURE: Beats = [
    [
        "One {time} {hero} found an old map inside a {look} {thing}.",
        "In the {place} {hero} found a map under a {look} {thing}.",
    ],
    [
        "It showed the way to the {place2}.",
        "There was a {color} cross near the {place2}.",
    ],
    [
        '"A treasure!" said {hero}, and {he} ran to {friend}.',
        "{hero} showed the map to {friend}, who was {mood2}.",
    ],
    [
        "They packed {food} and a {thing2} and left at {time}.",
        "They took a {look} {thing2}, some {food} and {number} candles.",
    ],
    [
        "First they crossed the river near {town}.",
        "First they walked {number} miles to the {tree} tree.",
    ],
    [
        "Then a {color} {animal} stood in their way.",
        "Suddenly they heard a {sound}, and a {animal} jumped out.",
    ],
    [
        "{friend} gave the {animal} some {food}, and it let them pass.",
        '"It only wants our {food}," said {friend} {adverb}.',
    ],
    [
        "At last they came to the {place2} and began to dig.",
        "At the {place2} they dug for {number} hours.",
    ],
    [
        "With a {sound} they hit something hard.",
        '"Here is something!" cried {friend}.',
    ],
    [
        "It was a box full of {color} stones.",
        "It was a chest with {number} coins and a letter.",
        "But in the chest there was only a letter.",
    ],
    [
        'The letter said, "The real treasure is the friend who came with you."',
        "They gave half of it to the poor people of {town}.",
        "{hero} looked at {friend} and laughed until {he} could not stand.",
    ],
]

SCHOOL_PLAY: Beats = [
    [
        "In {month} the school of {town} put on a play about a {animal}.",
        "The teacher, {elder}, wanted to make a play about a {mood2} {animal}.",
    ],
    [
        "{hero} wanted to be the {animal}.",
        '"May I be the {animal}?" asked {hero}.',
    ],
    [
        "But {friend} was chosen, and {hero} had to be a {tree} tree.",
        '"{friend} will be the {animal}, and you will be a {tree} tree," said {elder}.',
    ],
    [
        "{hero} was {mood} and did not speak to {friend}.",
        '"A tree does nothing at all," said {hero} {adverb}.',
    ],
    [
        "Every {day} they practiced in the {place}.",
        "They made a {color} mask and a {look} {thing} for the stage.",
    ],
    [
        "Then the great {time} came, and the {place} was full.",
        "On {day} everybody in {town} came to watch.",
    ],
    [
        "In the middle of the play {friend} forgot the words.",
        "{friend} opened {their} mouth, but no word came out.",
    ],
    [
        "{hero} knew every line and whispered {adverb} from behind the leaves.",
        'The {tree} tree bent down and whispered, "Where is my {thing}?"',
    ],
    [
        "{friend} heard it, smiled and went on.",
        '"Where is my {thing}?" said {friend} in a loud voice, and the play went on.',
    ],
    [
        "At the end all the people clapped for {number} minutes.",
        "The people clapped, and {elder} threw {flower} on the stage.",
    ],
    [
        '"You saved me," said {friend}, and gave {hero} half of the {flower}.',
        '"The best {animal} needs the best tree," said {friend}.',
    ],
]

BAKING: Beats = [
    [
        "{hero} loved to bake {food} with {his} {relative}.",
        "Every {day} {hero} helped {his} {relative} to make {food}.",
    ],
    [
        "One {weather} {day} {his} {relative} was ill.",
        "But on {day} {his} {relative} hurt a hand and could not bake.",
    ],
    [
        '"Who will bake the {food} for {elder}?" asked {his} {relative}.',
        "And {elder} had ordered {number} plates of {food}!",
    ],
    [
        '"I can do it," said {hero} {adverb}.',
        '"Let me try," said {hero}, and put on a {color} apron.',
    ],
    [
        "First {he} mixed flour, butter and {food2} in a {look} {thing}.",
        "{He} put {number} eggs and some {food2} into the bowl.",
    ],
    [
        "Then there was a {sound}, and the bowl fell to the floor.",
        "But the {animal} jumped on the table with a {sound}.",
    ],
    [
        "Everything was covered with flour, even the {animal}.",
        "Now there was {food2} on the floor and flour on the {animal}.",
    ],
    [
        "{hero} called {friend}, and together they began again.",
        '"Do not worry," said {friend}. "We will start again."',
    ],
    [
        "They worked until {time} and did not rest.",
        "The kitchen smelled of {food} and {food2}.",
    ],
    [
        "At {time} {elder} came to the door.",
        "When the {food} were ready, {elder} came with a {look} {thing2}.",
    ],
    [
        '"These {food} are better than ever!" said {elder}.',
        "{elder} tasted the {food}, closed both eyes and smiled.",
    ],
]

FIRST_SNOW: Beats = [
    [
        "One {time} in December the whole town of {town} was white.",
        "{hero} looked out of the window, and the {place} was covered with snow.",
    ],
    [
        '"Snow!" cried {hero}, and ran outside with a {color} {thing}.',
        "{hero} put on a {color} scarf and ran to the {place}.",
    ],
    [
        "There {he} built a snow {animal} with {friend}.",
        "{hero} and {friend} made a big {animal} out of snow.",
    ],
    [
        "They gave it a {look} {thing} and eyes made of {food}.",
        "Its eyes were two black stones, and it wore a {look} {thing}.",
    ],
    [
        "In the night {hero} heard a {sound} outside.",
        "At midnight there was a {sound} near the {tree} tree.",
    ],
    [
        "The snow {animal} was walking {adverb} through the {place2}!",
        '"I am cold and {mood2}," said the snow {animal}.',
    ],
    [
        '"Can I help you?" asked {hero}.',
        "{hero} was {mood} at first, but then {he} opened the window.",
    ],
    [
        '"I want to see the {place2} before I melt," said the snow {animal}.',
        '"Please show me the {place2}," said the snow {animal} {adverb}.',
    ],
    [
        "So they went to the {place2} hand in hand under {number} stars.",
        "They walked to the {place2} and looked at the moon until {time}.",
    ],
    [
        "In the morning the snow was gone, and only the {look} {thing} was left.",
        "When the sun rose, there was only water and a {look} {thing}.",
    ],
    [
        '"Come back next winter," {hero} said {adverb}.',
        "{hero} kept the {look} {thing} and waited for the next winter.",
    ],
]

PLOTS = [
    LOST_PET,
    BIRTHDAY,
    BROKEN,
    STORM,
    GARDEN,
    NEIGHBOR,
    MARKET,
    TREASURE,
    SCHOOL_PLAY,
    BAKING,
    FIRST_SNOW,
]
