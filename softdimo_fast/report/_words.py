"""What the report says: names for people, and the explanation of the digits run. Plain text, not HTML."""

from __future__ import annotations

# Rows of the picture: key -> (label, caption).
PICTURE = {
    "real": ("Real", "Scans of handwritten digits that no model was trained on."),
    "recon": (
        "Reconstruction",
        "The same scans, written as a few tokens and drawn again. What follows can hardly be sharper.",
    ),
    "teacher1": (
        "Teacher, 1 step",
        "All tokens guessed at once. They do not know of each other, so several digits mix.",
    ),
    "teacher4": ("Teacher, 4 steps", "Guessed in four rounds, each seeing what came before."),
    "teacher16": ("Teacher, 16 steps", "The teacher at its best: one round for each token or so."),
    "dimo": (
        "One step, Di[M]O",
        "A generator that learned from the teacher: one pass through one network.",
    ),
    "cfg2_gan": (
        "One step + GAN",
        "Trained further against a critic that tells generated from real.",
    ),
    "reward": (
        "One step + reward",
        "Trained further to please a classifier that checks even or odd.",
    ),
}

# Rows of the metrics table: key -> name, in groups that a rule separates.
METRIC_GROUPS = (
    {"floor": "Real, against other real", "recon": "Reconstruction"},
    {
        "teacher1": "Teacher, 1 step",
        "teacher2": "Teacher, 2 steps",
        "teacher4": "Teacher, 4 steps",
        "teacher8": "Teacher, 8 steps",
        "teacher16": "Teacher, 16 steps",
    },
    {
        "dimo": "One step, Di[M]O",
        "dimo_argmax": "… likeliest tokens",
        "dimo_soft": "… soft tokens",
    },
    {
        "cfg2_control": "One step, guided teacher",
        "cfg2_gan": "… with GAN",
        "reward": "One step + reward",
    },
)

# Columns of the metrics table: key -> (heading, decimals, better: "lower", "higher" or "").
METRIC_COLUMNS = {
    "fd": ("FD", 2, "lower"),
    "accuracy": ("Parity", 3, "higher"),
    "precision": ("Precision", 3, "higher"),
    "recall": ("Recall", 3, "higher"),
    "coverage": ("Coverage", 3, "higher"),
    "entropy": ("Entropy", 2, "higher"),
    "n": ("Images", 0, ""),
}

SEARCH = {
    "bon1": "No search",
    "tteo": "TTEO",
    "bon4": "Best of 4",
    "bon4_tteo": "Best of 4 + TTEO",
    "bon16": "Best of 16",
}

INTRODUCTION = (
    "A network learned to draw handwritten digits of 8 by 8 pixels from 1,297 small scans; 500 more were "
    "kept aside to judge it. It is told only whether the digit should be even or odd. Which of the five "
    "digits, in whose handwriting: that it must decide by itself, and then draw all parts of the "
    "picture to match. Doing so in a single step is the hard part, and the subject of this page."
)

# The steps of the method: (name, explanation).
METHOD = (
    (
        "Pictures become tokens",
        "A tokenizer learns a small alphabet of strokes and writes each scan as a short row of its letters, "
        "the tokens. From here on, drawing a picture means choosing tokens.",
    ),
    (
        "A teacher fills in blanks",
        "Some tokens of a picture are blanked out, and a network learns to guess them: a masked diffusion "
        "model. To draw, it starts from blanks only, guesses, keeps the guesses it is surest of, and looks "
        "again. A step is one such round. Many steps give good digits, slowly. In one step every token is "
        "chosen without knowing the others, and the digits fall apart.",
    ),
    (
        "Many steps become one",
        "Di[M]O trains a generator to draw in one step what the teacher draws in many. The generator starts "
        "from partly random tokens, and these decide what it will draw. Its drawings are blanked out in "
        "part and shown to the teacher, and to an auxiliary network that knows the generator's habits; where "
        "the two would fill the blanks differently, the generator moves towards the teacher.",
    ),
    (
        "Soft tokens let it learn",
        "A chosen token is a hard decision, and no gradient passes through one. Soft-Di[M]O hands on the "
        "average of all tokens, weighted by their probabilities. Whatever can look at a picture can now "
        "train the generator: a critic that tells generated from real (GAN), or a classifier (reward).",
    ),
    (
        "Searching while drawing",
        "TTEO, test-time embedding optimization, leaves the network alone and changes what goes into it. A "
        "few steps along the gradient of a classifier often turn the drawing into the digit that was wanted, "
        "though nobody ever told the generator about digits. Best of N draws N times and keeps the one "
        "that the classifier likes most.",
    ),
)

# What the numbers mean: (name, explanation).
NUMBERS = (
    (
        "FD",
        "Fréchet distance: how far a crowd of generated images is from the crowd of kept-aside scans, as a "
        "classifier sees them. Lower is better. Real scans against other real scans give the floor, because "
        "500 scans are few.",
    ),
    ("Parity", "How often the image is of the kind that was asked for, even or odd."),
    ("Precision", "The share of generated images that look like real ones."),
    ("Recall", "The share of real images that look like generated ones: low when variety is lost."),
    ("Coverage", "The share of real images that have a generated one close by."),
    (
        "Entropy",
        "How evenly all ten digits are drawn; 2.30, the logarithm of ten, is the most there can be.",
    ),
    ("Hit rate", "How often the wanted digit was drawn."),
    (
        "Judge",
        "Parity, entropy and hit rate are read by a classifier that took no part in training or search. Its "
        "view of the images also underlies the other numbers.",
    ),
)
CONTROL = (
    (
        "Guided teacher",
        "A harder starting point: the teacher exaggerates (classifier-free guidance of 2), which makes "
        "digits clearer and less varied. The first of the two rows is the control, trained for as many "
        "steps as the second but without the GAN.",
    ),
)
RESULTS = "The rows of the picture, and some more, in numbers. The arrows show which way is better."
SEARCHING = (
    "The same generator, asked for one of the ten digits. Best of N draws N times and keeps one drawing; "
    "TTEO adjusts what goes into the network."
)
CURVES = (
    "Each curve runs over the training steps of its stage. Where a log holds more than can be drawn, the "
    "line is an average and the band around it shows the extremes."
)
