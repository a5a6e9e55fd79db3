"""The prompts that the demo model is trained on."""

NAMES = {
    "photo": ["photo", "photo", "photograph", "realistic photo", "plain picture", "real footage",
              "natural"],
    "ink": ["ink drawing", "ink drawing", "ink", "black and white drawing", "pen and ink",
            "line art", "manga", "etching", "woodcut"],
    "neon": ["neon night", "neon night", "neon", "glowing neon lights", "cyberpunk", "neon glow",
             "synthwave", "tron"],
    "watercolor": ["watercolor", "watercolor", "watercolour", "watercolor painting",
                   "pastel painting", "soft pastel", "aquarelle"],
    "mosaic": ["mosaic tiles", "mosaic tiles", "mosaic", "tiles", "roman mosaic", "stained glass"],
    "thermal": ["thermal camera", "thermal camera", "thermal", "heat map", "infrared camera",
                "thermal vision", "infrared"],
    "blueprint": ["blueprint", "blueprint", "technical blueprint", "blue print",
                  "white lines on blue", "architect plan", "technical drawing"],
    "poster": ["pop art poster", "pop art poster", "pop art", "poster", "screen print",
               "bold colors", "halftone", "warhol"],
    "sunset": ["golden sunset", "golden sunset", "sunset", "golden hour", "warm evening light",
               "sepia gold", "golden light"],
    "oil": ["oil painting", "oil painting", "oil", "painting", "impasto", "brush strokes",
            "van gogh"],
    "pencil": ["pencil sketch", "pencil sketch", "pencil", "sketch", "pencil drawing", "graphite",
               "charcoal"],
    "comic": ["comic", "comic", "comic book", "cartoon", "graphic novel", "comic style", "anime"],
}  # fmt: skip

SUBJECTS = [
    "a landscape", "mountains", "nature", "a house", "a city", "a street", "buildings",
    "a portrait", "a face", "a person", "a woman", "a man", "people", "a dancer", "an animal",
    "a cat", "a dog", "a bird", "a horse", "a fox", "a still life", "things on a table", "a car",
    "a room", "an interior", "a flower", "a child",
]  # fmt: skip

TEMPLATES = [
    "{look}", "{look}", "{look} style", "{subject}, {look}", "{look} of {subject}",
    "{look}, {subject}", "{subject} in {look} style", "{subject} as {look}", "a {look}",
    "in the style of {look}", "{look}, detailed", "a {look} of {subject}",
    "{look}, beautiful, high quality", "turn it into {look}",
]  # fmt: skip

# what ComfyUI users write that names no look; the rest of such prompts is words never seen
OTHERS = ["", "", "", "beautiful, high quality", "detailed", "{subject}", "{subject}, detailed",
          "?", "? ?", "? ? ? ?", "a ? of ?", "{subject}, ? ?"]  # fmt: skip
UNKNOWN = "?"


def prompt(look, rng):
    """A random prompt (str) for a look (key of NAMES); None: one that names no look."""
    if look is None:
        return str(rng.choice(OTHERS)).format(subject=rng.choice(SUBJECTS))
    if rng.random() < 0.45:
        return str(rng.choice(NAMES[look]))
    return str(rng.choice(TEMPLATES)).format(
        look=rng.choice(NAMES[look]), subject=rng.choice(SUBJECTS)
    )


def all_prompts():
    """Prompts that hold every word that `prompt` can give: the text encoder's vocabulary."""
    looks = [name for group in NAMES.values() for name in group]
    return [t.format(look=n, subject=SUBJECTS[0]) for t in TEMPLATES for n in looks] + [
        t.format(subject=s) for s in SUBJECTS for t in OTHERS if "?" not in t
    ]
