"""Task: the small vocabulary of the zoo, each word a single token for most byte-level tokenizers too."""

from __future__ import annotations

_FILLERS = """
a about above age air all along always among an and another any arm around art as at away bad be beautiful became
because been before began behind beside best better black blood body bottom bread brown build building but by came car
care carry case center choose church circle city class clean clear climb close coast cold color come cook corner cost
could country course cover cried cross crowd cut dance dark daughter day dead deal did different dinner direct
distance do draw drink drop each earth east easy egg either empty even evening every example eye face fair family farm
farmer feet fell field fight film find fine first floor fly follow forest found fresh friend front fruit garden gate
gave get girl give gold grass green ground group had hair hall hard have hear heart heat help her here his history
hold home hope hot hour house how ice idea in it job join journey joy just keep kind king kitchen knew know land
language late laugh lead letter level life light like line listen live look lost love machine march mark market me
meal meat meet middle might mile mind minute moment money month moon more most mountain mouth move much music must
name near night noise noon north not note nothing of off often on only or orange other our out outside over own page
paper park part pass past path people perhaps plain plan plant port power pretty price public push put queen quick
quite rain ran reach read ready real red rich ride right rise river room root rose round run said sailor salt same
sand sat save saw say school sea seem sell send sent set shade shall shape she shop shore short should show side sign
silver simple sister sit sleep small smell smoke snow so soil some son south speak spring square stand start stay
still store storm strange street such sugar summer sun sure sweet swim tail tall taste teach than that the them then
there thin thing think this though thought through time to today together told too took touch toward town travel trip
true try until up upon us valley view voice wait wall want war warm was wash we weather week well went west what when
white whole wide will wind window wine winter wish woman wonder word work world write yard yellow yes you your
"""
FILLERS: tuple[str, ...] = tuple(_FILLERS.split())
"""What the made-up prose consists of."""

_KEYS = """
ant bear bee beetle bird bull camel cat chicken cow crab crow deer dog dolphin donkey dragon duck eagle elephant
falcon fox frog giraffe goat goose hare hawk hen horse kitten lamb lion lizard monkey moth mouse mule owl oyster panda
parrot pig pigeon pony rabbit rat salmon seal shark sheep snake sparrow spider squirrel tiger toad trout turkey turtle
whale wolf worm zebra
"""
KEYS: tuple[str, ...] = tuple(_KEYS.split())
"""What is asked for, in both tasks."""

_VALUES = """
basket bell blanket book boot bowl box brush bucket candle cap card chain chair clock coat coin comb cup dish door
drum flag flute fork glass glove hammer jar key kite knife ladder map mask nail needle net paint pan pen piano pillow
pin plate pot ring rope ruler shirt shoe spoon stamp stone stool sword table tent toy tray trumpet umbrella violin
wheel
"""
VALUES: tuple[str, ...] = tuple(_VALUES.split())
"""What belongs to a key in ``zoo_recall``."""

DIGITS: tuple[str, ...] = tuple("0123456789")
"""What a needle of ``zoo_needle`` consists of."""

OTHERS: tuple[str, ...] = ("magic", "is", "again", ".", ",", ":", "?")
"""What statements and questions are worded with, and a few words and marks for other wordings."""

VOCABULARY: tuple[str, ...] = (*OTHERS, *DIGITS, *KEYS, *VALUES, *FILLERS)
"""Every word of both tasks, once."""
