"""clipret-search: index pictures, query them by text and picture, evaluate."""

import click

from clipret.cli.competition import merge_command, submit
from clipret.cli.complete import complete
from clipret.cli.completion import completion
from clipret.cli.doctor import doctor
from clipret.cli.flip import mirror
from clipret.cli.gallery import add, compact, index, info, remove
from clipret.cli.plan import plan_command
from clipret.cli.search import eval_command, query
from clipret.cli.serve import serve_command
from clipret.cli.transfer import export_command, import_command
from clipret.console import Group


@click.group(
    "clipret-search", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="clipret")
def main() -> None:
    """Search pictures by text: exact results, no torch.

    \b
    clipret-search index BUNDLE pictures/ GALLERY      encode pictures once
    clipret-search query GALLERY "a red sedan"         find the best ten
    clipret-search eval GALLERY queries.csv            recall@k, mAP@10

    A bundle is a model ready to search with; clipret-export makes one. The tab key completes all this once
    clipret-search completion  has told your shell how.
    """


for command in (
    index,
    add,
    query,
    eval_command,
    merge_command,
    submit,
    complete,
    mirror,
    info,
    remove,
    compact,
    export_command,
    import_command,
    serve_command,
    plan_command,
    doctor,
    completion,
):
    main.add_command(command)
