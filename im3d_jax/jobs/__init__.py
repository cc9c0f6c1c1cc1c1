"""Many assets: files of prompts, shards, what is made already, lanes of workers, signals, table and gallery.

A batch is a directory:

    assets/000000/      an asset, numbered in the order of the file of prompts, or error.json
    pictures/           what `config.text_to_image.pipeline` has drawn
    config_DIGEST.json  each config that assets were made from
    job.json            what was asked for
    index.parquet, summary.json, gallery.html
"""

from recon_torch.outputs import Kind

ASSETS, PICTURES = "assets", "pictures"
ERROR = "error.json"

FAILED = "failed"
"""What is said of an asset that could not be made, where others have a verdict."""

BATCH = Kind(
    "batch", (r"job\.json", r"index\.parquet", r"summary\.json", r"gallery(_\d+)?\.html"), grows=True
)
"""What a batch writes into its own directory; those of its assets know their own files."""

CONFIGS = Kind("batch", (r"config_[0-9a-f]{16}\.json",), grows=True)
"""The same of its configs."""

FAILURE = Kind("batch", (r"error\.json",))
"""What a batch writes into the directory of an asset that could not be made."""
