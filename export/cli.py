"""clipret-export: a model in, a bundle out."""

from pathlib import Path

import click

from clipret.console import SingleCommand, show_table
from clipret.errors import require


@click.command(
    "clipret-export",
    cls=SingleCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example:  clipret-export runs/cars bundles/cars --fp16",
)
@click.argument("source")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--fp16", is_flag=True, help="Matrix products in half precision, the residual stream in float32.")
@click.option("--overwrite", is_flag=True, help="Replace BUNDLE; the old one stays until the new is whole.")
@click.version_option(package_name="clipret")
def main(source: str, bundle: Path, fp16: bool, overwrite: bool) -> None:
    """Export SOURCE to the folder BUNDLE: both towers as ONNX, the tokenizer, a manifest.

    SOURCE is one of

    \b
    runs/cars                    a run folder of clipret-train (its best checkpoint)
    runs/cars/checkpoints/last.safetensors
    ViT-B-32:laion2b_s34b_b79k   an OpenCLIP model with a pretrained tag
    ViT-B-32:weights.pt          the same architecture with local weights

    The towers take uint8 pictures and token ids in batches of any size and give rows of unit length. They are compared
    with torch by the code that searches; a tower that differs is never written.
    """
    for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
        require(package, "export")
    from clipret.export.pipeline import export_bundle

    made = export_bundle(source, bundle, precision="fp16" if fp16 else "fp32", overwrite=overwrite)
    manifest = made.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    rows = [
        ("model", manifest.model),
        ("precision", manifest.precision),
        ("picture", f"{manifest.image.size} px, {manifest.image.resize}"),
        ("text", f"up to {manifest.text.context_length} tokens"),
        ("embedding", str(manifest.embedding_dim)),
        ("size", f"{size / 1e6:.1f} MB"),
        ("fingerprint", made.fingerprint[:16]),
    ]
    click.echo(f"{made.path}")
    click.echo(show_table(("what", "value"), rows))


if __name__ == "__main__":
    main()
