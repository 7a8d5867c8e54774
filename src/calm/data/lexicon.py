"""Words of the embedded corpus. Earlier words of a list are chosen more often."""

GIRLS = """
Mia Anna Lily Rosa Emma Clara Nora Ruby Ella Maya Zoe Alice Hana Greta Ivy Leila Sofia Tess Wanda
Olive Priya Freya Daisy Carmen Edith Hazel Juno Kira Lena Molly Nina Opal Pearl Quinn Rita Sara Tara
Una Vera Willa Yara Zelda Amina Beth Celia Dora Elsa Flora Gemma Holly Ines Joan Kate Lucy Mabel
Naomi Olga Petra Rosie Sally Thea Ursula Violet Wilma Xenia Yvonne Agnes Bella Chloe Delia Esther
Fiona Grace Heidi Irene Jade Karen Laura Maria Nadia Odette Paula Rachel Selma Tilda Valerie Winnie
Abigail Bridget Cora Diana Eliza Frida Gloria Helen Imogen Judith Katya Lydia Martha Nell Ophelia
Phoebe Rebecca Stella Tamara Viola Anita Beatrice Camille Dolores Estelle Felicia Georgia Harriet
""".split()

BOYS = """
Tom Ben Max Sam Leo Jack Omar Finn Hugo Noah Oscar Theo Ravi Kai Felix Henry Jonas Luca Milo Otto
Paul Rafi Simon Toby Victor Walter Yusuf Adam Bruno Carl David Elias Frank George Harry Ivan Jacob
Karim Liam Martin Nils Oliver Peter Quentin Robin Stefan Tim Ugo Vince Will Xavier Yann Zach Albert
Basil Cedric Dylan Edgar Fergus Gavin Hector Isaac Joel Kurt Lars Marcus Neil Orson Pablo Ralph
Samir Trevor Ulrich Vernon Wesley Anton Boris Colin Derek Ethan Floyd Gilbert Howard Igor Jasper
Kenneth Leonard Morris Nathan Owen Patrick Ronald Stanley Tobias Warren Alfred Bernard Clyde Dennis
Eugene Francis Gustav Herman Irving Julian Kevin Lionel Magnus Norman Pascal Reuben Sebastian Thomas
""".split()

SURNAMES = """
Baker Miller Fletcher Cooper Mason Hill Brook Marsh Stone Potter Carter Weaver Archer Bishop Chandler
Dyer Farmer Gardner Hunter Judge Knight Lambert Mercer Norris Palmer Quigley Rhodes Shepherd Turner
Underwood Vaughn Walker Yates Abbott Barlow Crane Dunn Ellis Frost Grant Hobbs Irwin Jarvis Kemp
Lowell Morrow Nash Osborne Pike Reed Sutton Tanner Vance Webb Young Ashby Bell Clay Dale Finch
Goodwin Hale Ingram Keats Larkin Moss North Oakley Pruitt Rowe Swift Thorne Ward
""".split()

TOWN_STARTS = """
Ash Willow Oak Stone River Green Black White Fox Hazel Elm Maple Cold Silver Mill Red Wood Spring
Winter Summer Moss Thorn Raven Swan Deer Honey Apple Clover Fern Long
""".split()
TOWN_ENDS = "ford brook field dale ton bridge wood hill mere ham port gate wick combe stead".split()

ANIMALS = """
dog cat rabbit horse duck goat bird pony mouse hen fox owl sheep frog turtle pig squirrel cow puppy
kitten hedgehog parrot donkey goose crow bear deer lamb hamster lizard badger beaver robin swan otter
mole sparrow rooster toad snail calf chick ferret pigeon raven stork weasel heron lynx magpie newt
peacock quail seal swallow tortoise turkey vole wren finch falcon gecko hare jay kestrel lark llama
marten pelican puffin raccoon skunk starling thrush walrus alpaca bat cricket dove eagle
""".split()

THINGS = """
kite ball lamp boat drum hat book clock bell key basket box ring scarf toy bicycle blanket mirror
whistle wagon umbrella ladder flute rope bucket chair candle letter map coin cup jar lantern necklace
paintbrush pencil puzzle quilt rocket sled spoon teapot violin watch wheel bag bottle bracelet broom
button camera cart compass crown cushion doll drawer fan feather flag globe glove guitar hammer
hammock harp helmet jacket kettle knot lock magnet marble mask medal mitten notebook oar painting
parachute pillow pipe plate pocketknife postcard pot purse raft rake robot sack saddle sail scooter
shell shield shoe shovel slipper stamp statue stool stove suitcase swing sword table telescope ticket
top tray trophy trumpet trunk vase vest wallet wand whip windmill wreath yo-yo zipper accordion
anchor apron axe backpack badge banjo barrel bead belt bench binoculars brush cabinet cane cello
chain chest coat comb crate curtain cymbal desk dictionary dress envelope fiddle fork frame funnel
gong hook horn hourglass jug kayak lever locket loom mallet mug nail napkin needle net oboe padlock
parcel pebble pen piano pin puppet ribbon sandal saw scale scroll sieve spade sponge spring string
sundial tent thimble thread torch tripod tuba wheelbarrow wig
""".split()

PLACES = """
park garden forest market river school barn beach hill library kitchen lake farm bridge meadow
harbor attic station square village bakery tower mill castle museum playground orchard pond stable
cellar cave field island shop workshop valley theater greenhouse mountain lighthouse dock fountain
church courtyard cottage creek desert factory ferry fort gallery gym hall hospital inn jungle lane
mine monastery palace pier port quarry ranch ruin shed shore stadium stream street swamp temple
terrace trail tunnel vineyard wharf yard zoo alley arcade balcony bay cabin camp canal chapel cliff
""".split()

FOODS = """
bread soup cake apples cheese honey pie cookies milk berries pancakes plums jam rice noodles pears
carrots tea nuts cherries potatoes butter grapes stew peaches muffins lemons beans porridge oranges
pudding corn tomatoes waffles dumplings salad sandwiches sausages melons pumpkins onions cabbage
mushrooms peas pretzels raisins walnuts yogurt almonds apricots biscuits broth buns cider cocoa
crackers cream custard dates eggs figs fudge garlic ginger gravy herbs lentils mangoes olives omelets
pastries peppers pickles popcorn radishes rolls scones spinach syrup tarts toast toffee turnips
""".split()

COLORS = """
red blue green yellow white brown black golden silver gray orange purple pink violet copper crimson
turquoise ivory scarlet amber bronze olive indigo maroon beige teal
""".split()

LOOKS = """
little old big small shiny round long soft heavy tiny pretty strange wooden bright broken fine dusty
smooth tall plain striped warm thin spotted rusty curved painted delicate sturdy worn narrow polished
crooked fluffy carved flat enormous sparkling ragged square hollow woolen muddy glass leather velvet
paper clay tin lovely battered handmade patched glossy rough slender foreign ancient modest splendid
""".split()

MOODS = """
happy sad tired brave curious quiet proud hungry worried kind shy clever cheerful careful lonely
angry excited gentle patient nervous honest busy stubborn sleepy generous grumpy eager polite bold
calm grateful hopeful jealous lively merry modest playful puzzled restless serious silly thoughtful
bashful determined dreamy earnest friendly gloomy humble impatient joyful lazy loyal moody noisy
""".split()

ADVERBS = """
slowly quickly softly gently quietly happily carefully suddenly loudly sadly proudly bravely kindly
eagerly calmly gladly warmly politely patiently nervously cheerfully silently angrily shyly firmly
merrily sleepily thoughtfully honestly clumsily gracefully solemnly briskly boldly earnestly
""".split()

JOBS = """
farmer baker teacher doctor sailor painter gardener carpenter miller tailor fisherman librarian
shepherd blacksmith postman captain cook musician potter clockmaker weaver builder shoemaker nurse
beekeeper butcher barber cobbler dentist driver fireman florist grocer guard hunter innkeeper jeweler
judge knitter locksmith mason mayor merchant plumber pilot poet printer sculptor singer smith
watchman writer zookeeper actor astronomer banker mechanic explorer
""".split()

RELATIVES = """
mother father grandmother grandfather sister brother aunt uncle cousin neighbor teacher
godmother godfather stepfather stepmother niece nephew
""".split()

TREES = """
oak apple pine willow cherry birch maple elm pear chestnut fir plum beech cedar walnut poplar hazel
fig lemon ash spruce linden olive hawthorn rowan
""".split()

FLOWERS = """
roses daisies tulips sunflowers violets lilies poppies bluebells daffodils marigolds pansies
dandelions irises peonies snowdrops primroses lavender buttercups dahlias geraniums orchids asters
carnations hyacinths jasmine zinnias
""".split()

WEATHERS = """
sunny windy rainy cloudy snowy foggy stormy warm cold misty bright frosty breezy chilly damp mild
hot dry icy hazy humid drizzly crisp
""".split()

DAYS = "Saturday Sunday Monday Friday Tuesday Thursday Wednesday".split()
MONTHS = """
May June April September October March July August December November January February
""".split()
TIMES = "morning afternoon evening night noon dusk dawn midnight sunset sunrise".split()
NUMBERS = """
two three four five six seven ten twelve eight nine eleven twenty thirty fifteen forty fifty thirteen
fourteen sixteen seventeen eighteen nineteen sixty seventy
""".split()

SOUNDS = """
bang creak whisper rustle splash knock thump squeak rattle howl hum click crack buzz clang groan hiss
jingle murmur patter roar rumble scratch shriek snap sob thud tick whoosh
""".split()

PET_NAMES = """
Biscuit Patch Shadow Pepper Lucky Button Ginger Coco Rusty Snowball Whiskers Pip Cloud Nutmeg Domino
Bramble Tiger Smoky Marble Pickle Hazelnut Comet Waffle Sooty Bandit Cricket Dusty Freckles Goldie
Mittens Noodle Pebbles Ranger Scout Thunder Truffle Velvet Zigzag
""".split()
