"""`millrace export CHECKPOINT DIR`: a checkpoint's weights as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace DIRECTORY if it is there.")
@click.option("--adapter", is_flag=True, help="Of a LoRA run: the adapter alone, not merged into its model.")
def export_command(checkpoint: Path, directory: Path, dtype: str, overwrite: bool, adapter: bool) -> None:
    """Write the weights, configuration and tokenizer of CHECKPOINT to DIRECTORY, for transformers, vLLM or SGLang.

    CHECKPOINT is RUN/checkpoints/step-000050, or RUN: its newest checkpoint.
    """
    from learner.checkpoint import latest
    from learner.errors import CheckpointError
    from learner.export import export_checkpoint

    chosen = checkpoint
    if (checkpoint / "checkpoints").is_dir():
        newest = latest(checkpoint / "checkpoints")
        if newest is None:
            raise click.ClickException(f"{checkpoint} has no checkpoint yet")
        chosen = newest
    try:
        nbytes = export_checkpoint(chosen, directory, dtype, overwrite=overwrite, adapter=adapter)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{chosen} -> {directory}: {nbytes / 1e6:.1f} MB of weights in {dtype}")
