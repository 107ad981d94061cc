"""A torch_dist checkpoint -> a Hugging Face directory, without Megatron, process group or GPU.

Streaming: one Megatron tensor (or one chunk of the vocabulary) is in memory at a time.
"""

from pathlib import Path

from megatron_opdlm.convert.errors import ConversionError
from megatron_opdlm.convert.files import atomic_directory, require_writable_output
from megatron_opdlm.convert.hf import DTYPES
from megatron_opdlm.convert.layout import ModelDescription, read_description, resolve_iteration
from megatron_opdlm.convert.model_tensors import SHARD_BYTES, ModelTensors, write_weights
from megatron_opdlm.convert.sdar_files import write_sdar_files


def export_sdar(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    iteration: int | None = None,
    block_size: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Export a student in the `sdar` format (transformers, LMDeploy, SGLang, JetEngine).

    Args:
        checkpoint_dir: checkpoint root or iteration folder, of an import or of a training run.
        out_dir: folder to create; must not exist or be empty.
        iteration: which iteration; None for the latest.
        block_size: needed only if the checkpoint was not trained; must equal the trained one.
        dtype: 'float32', 'bfloat16' or 'float16'; None as stored.
        shard_bytes: largest safetensors file.
        progress: show a progress bar on stderr.

    Raises:
        ConversionError: not a checkpoint of a student, missing, extra or mis-shaped tensors, NaN or
            infinite weights, an output that exists. Nothing half-written stays behind.
        OSError: the disk is full or not writable; nothing half-written stays behind.
    """
    out = Path(out_dir)
    require_writable_output(out)
    iteration_dir = resolve_iteration(checkpoint_dir, iteration)
    description = read_description(iteration_dir)
    size = _block_size(iteration_dir, description, block_size)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype={dtype!r} must be one of {sorted(DTYPES)}")
    source = ModelTensors(iteration_dir, description.config)
    with atomic_directory(out) as partial:
        name = dtype or str(source.dtype).removeprefix("torch.")
        write_sdar_files(
            partial,
            iteration_dir,
            description,
            block_size=size,
            dtype=name,
            name=out.absolute().name,
        )
        write_weights(partial, source, DTYPES[dtype] if dtype else None, shard_bytes, progress)


def _block_size(iteration_dir: Path, description: ModelDescription, requested: int | None) -> int:
    trained = description.block_size
    if requested is not None and requested < 1:
        raise ConversionError(f"block_size={requested} must be positive")
    if trained is None and requested is None:
        raise ConversionError(
            f"{iteration_dir}: the weights were not trained for a block size yet; pass --block-size"
        )
    if trained is not None and requested not in (None, trained):
        raise ConversionError(
            f"block_size={requested} must equal the {trained} that the weights were trained for"
        )
    return trained if requested is None else requested  # type: ignore[return-value]
