"""Gets the files of a benchmark from the Hugging Face hub."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.benchmarks.benchmark import Benchmark


def fetch_from_hub(benchmark: Benchmark) -> str:
    """Downloads the published files, if they are not there yet.

    This is the only place of the package that uses the network.

    Returns:
        A folder below HF_HOME with these files and no others.

    Raises:
        ValueError: the benchmark is not on the hub, or its files cannot be downloaded.
    """
    hub = benchmark.hub
    fix = f"get it from {benchmark.source}"
    require(hub is not None, "benchmark", benchmark.name, "is not on the Hugging Face hub", fix)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    folder = Path(constants.HF_HOME) / "opdlm_benchmarks" / benchmark.name
    for part in hub or ():
        place = folder / part.repository.replace("/", "--")
        name = f"{benchmark.name}: {part.repository}"
        try:
            snapshot_download(
                part.repository,
                repo_type="dataset",
                allow_patterns=list(part.files),
                local_dir=place,
            )
        except GatedRepoError:
            raise ValueError(
                f"{name} asks for its terms to be accepted; do so at "
                f"https://huggingface.co/datasets/{part.repository}, then run `hf auth login`"
            ) from None
        except OSError as error:  # as are all errors of the hub
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{name} cannot be downloaded: {reason}; {fix}") from None
        names = [file.relative_to(place).as_posix() for file in place.rglob("*")]
        if not any(fnmatch(file, pattern) for file in names for pattern in part.files):
            raise ValueError(f"{name} has no file called {' or '.join(part.files)} any more; {fix}")
    return str(folder)
