"""clipret-train: fine-tune or train a CLIP model, and draw data to try it on."""

import click

from clipret.console import LazyGroup

COMMANDS = {
    "Training": {
        "fit": "clipret_training.cli.fit:fit",
        "models": "clipret_training.cli.models:models",
        "soup": "clipret_training.cli.soup:soup",
    },
    "Data and competitions": {
        "data": "clipret_training.cli.data:data",
        "run": "clipret_training.cli.run:run",
    },
}


@click.group(
    "clipret-train",
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="clipret")
def main() -> None:
    """Train CLIP models on your images and captions.

    \b
    clipret-train fit captions.csv --model clipret-small --out run     from scratch, on a CPU
    clipret-train fit captions.csv --model ViT-B-32:laion2b_s34b_b79k --out run
    clipret-train fit --resume --out run                               after an interruption
    clipret-train models ViT-B-32                                      names for --model; recipes
    clipret-train soup run1 run2 --how uniform --out run               the mean of several runs
    clipret-train data scenes OUT --count 2000                         drawn traffic scenes with captions
    clipret-train data traffic train_label.txt OUT                     a competition's labels, checked
    clipret-train run traffic --out work                               from raw files to the answer
    """
