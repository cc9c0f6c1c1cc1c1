"""Many assets: files of prompts, shards, what is made already, lanes of workers, signals, and the gallery.

A batch is a directory:

    assets/000000/      an asset, numbered in the order of the file of prompts, or error.json that says why
    not pictures/           what `config.text_to_image.pipeline` has drawn summary.json, gallery.html
"""

ASSETS, PICTURES = "assets", "pictures"
ERROR = "error.json"
