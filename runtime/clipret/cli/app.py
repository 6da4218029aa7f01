"""clipret-search: index images, query them by text and image, evaluate."""

import click

from clipret.console import LazyGroup

# Loaded when they are called for: a query need not pay for what the other commands import.
COMMANDS = {
    "Search": {
        "index": "clipret.cli.gallery:index",
        "query": "clipret.cli.query:query",
        "eval": "clipret.cli.evaluate:eval_command",
        "serve": "clipret.cli.serve:serve_command",
    },
    "Galleries": {
        "info": "clipret.cli.gallery:info",
        "remove": "clipret.cli.gallery:remove",
        "compact": "clipret.cli.gallery:compact",
        "export": "clipret.cli.transfer:export_command",
        "import": "clipret.cli.transfer:import_command",
    },
    "This machine": {
        "doctor": "clipret.cli.doctor:doctor",
        "plan": "clipret.cli.plan:plan_command",
    },
    "Competitions": {
        "merge": "clipret.cli.competition:merge_command",
        "submit": "clipret.cli.competition:submit",
        "complete": "clipret.cli.complete:complete",
    },
}


@click.group(
    "clipret-search",
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="clipret")
def main() -> None:
    """Search images by text: exact results, no torch.

    \b
    clipret-search index BUNDLE images/ GALLERY      encode images once
    clipret-search query GALLERY "a red sedan"         find the best ten
    clipret-search eval GALLERY queries.csv            recall@k, mAP@10

    A bundle is a model ready to search with; clipret-export makes one. For the tab key in bash, zsh (zsh_source) and
    fish (fish_source):  eval "$(_CLIPRET_SEARCH_COMPLETE=bash_source clipret-search)"
    """
