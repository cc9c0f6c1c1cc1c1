"""The human study (Fig. 5, A.2): which of two turntables annotators prefer, by two questions.

A study is a directory:

    study.json          what is asked, of which videos, in which order and on which side
    annotators.csv      the secret token of each annotator, for their owner's eyes
    files/              the videos and pictures, under names that do not tell the method
    answers.sqlite      the answers, unless they are in another database
    results/            what the answers come to

Nothing here imports JAX or torch: a study runs on any machine that has its directory.
"""

from recon_torch.outputs import Kind

STUDY, ANNOTATORS, FILES, ANSWERS, RESULTS = (
    "study.json",
    "annotators.csv",
    "files",
    "answers.sqlite",
    "results",
)

NEW = Kind("study new", (r"study\.json", r"annotators\.csv", r"files/[0-9a-f]+\.(mp4|png)"))
"""What `im3d study new` writes."""

LEFT, RIGHT = SIDES = ("left", "right")
