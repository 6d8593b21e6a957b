"""A small handbook of eight subjects, and what people would ask about each passage in words of their own."""

from __future__ import annotations

PASSAGES = {
    "coffee": "The espresso machine must be descaled every six weeks. Fill the tank with citric acid solution, "
    "let it run through both groups, and rinse twice with clear water before anyone drinks from it.",
    "bicycle": "A bicycle chain wears as it stretches. Measure it with a gauge every thousand kilometres and "
    "change it at 0.75 percent, or the sprockets will have to be replaced together with it.",
    "bread": "Sourdough needs no commercial yeast. Wild yeasts and lactic bacteria in the starter raise the "
    "loaf overnight, and the long fermentation gives it its tang.",
    "whales": "Humpback whales travel about eight thousand kilometres each way between their feeding grounds "
    "near the poles and the warm waters where they give birth.",
    "violin": "The bow of a violin is strung with horse hair. Rosin makes the hair sticky enough to grip the "
    "string and set it vibrating; without it the instrument stays nearly silent.",
    "tides": "The Moon pulls the ocean into two bulges, one facing it and one on the opposite side. As the "
    "Earth turns beneath them, most coasts see high water twice a day.",
    "vaccines": "A vaccine shows the immune system a harmless part of a germ. Memory cells stay behind, and when "
    "the real disease arrives antibodies are made within days instead of weeks.",
    "glass": "Window glass is made by floating the melt on a bath of molten tin. Gravity makes both faces "
    "perfectly flat, so no polishing is needed.",
    "bees": "A honeybee that has found flowers dances on the comb. The angle of her run tells the direction "
    "relative to the sun, and its length the distance.",
    "chess": "A pawn that reaches the last rank must be promoted at once, most often to a queen. A knight is "
    "chosen when it gives check or avoids a stalemate.",
    "volcano": "Magma rich in silica is thick and traps gas, so the volcano explodes. Runny basaltic lava lets "
    "the gas escape and flows away quietly.",
    "library": "Books may be borrowed for four weeks and renewed twice unless another reader has reserved them. "
    "Late returns cost twenty cents a day.",
    "battery": "Lithium cells age fastest when they are kept hot and full. Storing them at half charge in a cool"
    " place can double their life.",
    "marathon": "Around the thirtieth kilometre a runner's glycogen is spent and the legs turn heavy. Eating "
    "carbohydrates on the way puts this wall off.",
    "passport": "An application for a new passport needs the old one, a biometric photograph not older than six "
    "months, and the fee. It takes about five weeks until it can be collected.",
    "compost": "A compost heap needs two parts of dry brown leaves for one part of green kitchen scraps. Turning"
    " it every fortnight brings in air and keeps it from smelling.",
    "fireworks": "Metal salts colour fireworks: strontium burns red, barium green, copper blue, and sodium yellow.",
    "octopus": "An octopus has three hearts and blue blood, since its oxygen is carried by copper instead of iron.",
    "rainbow": "Sunlight is bent on entering a raindrop, reflected at its back and bent again on leaving. Each "
    "colour leaves at an angle of its own, so the observer sees an arc.",
    "router": "If the internet connection fails, unplug the router for thirty seconds and plug it in again. "
    "When the lamp stays red, call the provider's hotline.",
    "mortgage": "With a fixed rate the monthly payment of a home loan stays the same for the agreed years. "
    "Afterwards it is set anew by the market, which may be dearer.",
    "penguins": "Emperor penguins breed in the Antarctic winter. The males hold the egg on their feet for two "
    "months and eat nothing until the females return from the sea.",
    "printing": "Gutenberg cast single letters of a lead alloy that could be set, printed from and used again. "
    "Books became cheap, and within fifty years millions were in circulation.",
    "allergy": "In hay fever the body takes pollen for a threat and releases histamine, which makes the nose run"
    " and the eyes itch. Antihistamines block its receptors.",
}

QUESTIONS = [
    ("coffee", "How often do I have to remove limescale from the coffee maker?"),
    ("coffee", "What do I put into the water tank to clean the espresso maker?"),
    ("bicycle", "When should I replace the worn drive chain of my bike?"),
    ("bicycle", "Why would I need new cogs if I ride a stretched chain for too long?"),
    ("bread", "What makes a loaf rise if you do not buy yeast?"),
    ("bread", "Where does the sour taste of naturally leavened bread come from?"),
    ("whales", "How far do humpbacks migrate?"),
    ("whales", "Where do large sea mammals go to have their calves?"),
    ("violin", "Why do string players rub resin on their bow?"),
    ("violin", "What animal fibre is used to play a fiddle?"),
    ("tides", "Why does the sea rise and fall two times every day?"),
    ("tides", "Which heavenly body is responsible for ebb and flow?"),
    ("vaccines", "How does an immunisation protect me later on?"),
    ("vaccines", "Why does the body react faster to an infection it was inoculated against?"),
    ("glass", "How do factories get panes so smooth without grinding them?"),
    ("glass", "Which liquid metal is used in making windows?"),
    ("bees", "How do bees tell each other where nectar is?"),
    ("bees", "What does the waggle of an insect in the hive communicate?"),
    ("chess", "What happens when my pawn gets to the other end of the board?"),
    ("chess", "When is underpromotion to a knight a good idea?"),
    ("volcano", "Why are some eruptions violent and others gentle?"),
    ("volcano", "What role does trapped gas play in molten rock?"),
    ("library", "What is the fine if I bring a novel back after the due date?"),
    ("library", "How long can I keep a book that I took out?"),
    ("battery", "What is the best way to store phone accumulators for a long time?"),
    ("battery", "Does heat harm a rechargeable lithium pack?"),
    ("marathon", "Why do long-distance runners suddenly run out of energy?"),
    ("marathon", "What should I eat in a 42 km race to avoid hitting the wall?"),
    ("passport", "Which papers are required to get a new travel document?"),
    ("passport", "How recent must the picture for my passport be?"),
    ("compost", "What is the right mix of garden and kitchen waste?"),
    ("compost", "How do I stop my heap of rotting scraps from stinking?"),
    ("fireworks", "Which element gives a green rocket on New Year's Eve?"),
    ("fireworks", "How do pyrotechnicians make different colours?"),
    ("octopus", "Which sea creature pumps blood with several hearts?"),
    ("octopus", "Why is the blood of some cephalopods blue?"),
    ("rainbow", "How does a coloured bow form in the sky after rain?"),
    ("rainbow", "What does refraction in water drops do to light?"),
    ("router", "My wifi box has lost its connection, what should I do?"),
    ("router", "Whom do I contact if the red light on the modem does not go away?"),
    ("mortgage", "Can the instalments on my house change later?"),
    ("mortgage", "What is the advantage of locking the interest on a property loan?"),
    ("penguins", "Which birds incubate their eggs on the ice while fasting?"),
    ("penguins", "What do father penguins do while their partners are fishing?"),
    ("printing", "Who invented movable type?"),
    ("printing", "How did books become affordable in the fifteenth century?"),
    ("allergy", "Why do I sneeze and get watery eyes in spring?"),
    ("allergy", "How do pills against pollen reactions work?"),
]
