"""The words of the shop: customers, goods, states of an order, notes. Every word is one token of the small recipe."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    ada agnes albert alma amir anna anton asha basil bea boris bruno carla cyril daria dina edgar elena emil erik esme
    farah felix fiona frida gavin gina greta hana hector hugo ida igor ines iris ivan jana jonas julia karl katya kofi
    lars lena leo lidia luca mabel malik marta milo mona nadia nils nora olga omar oscar paula petra priya quinn ravi
    rosa rufus selma sven tariq vera yusuf
    """
)
ITEMS = _words(
    """
    anvil apron axe bag ball basket bell bench bike blanket boots bottle bowl box broom brush bucket candle carpet
    chain chair clock coat compass cup curtain desk drum fan flute fork globe gloves hammer hat helmet jar kettle kite
    knife ladder lamp lantern lock map mirror mug needle oven paddle pan pen phone pillow plate radio ring rope saddle
    scarf shelf shovel sofa spoon stool tent towel tray vase violin wallet
    """
)
LATE = "late"
STATUSES: tuple[str, ...] = (
    LATE,
    "packed",
    "paid",
    "shipped",
    "customs",
    "delivered",
    "returned",
    "damaged",
    "waiting",
    "sorted",
)
NOTES = _words(
    "vip angry calm gift fragile urgent callback apology loyal wholesale checked patient upset regular student staff"
)
NONE_LEFT = "none"
"""What the shop says of a stock of zero, and the right answer to a question about it."""
