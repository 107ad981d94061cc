"""A loaded student that answers prompts, for `opdlm generate`, `opdlm eval` and training."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opdlm.convert.import_cache import ImportCache
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.convert.tokenizer import MASK_TOKEN
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distill.student import DTYPES, Student, load_student
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.distributed.process_groups import ParallelState, from_main
from megatron_opdlm.files.signals import stopped_by_signals
from megatron_opdlm.generate.arguments import prompt_room
from megatron_opdlm.model.gpt import BuildOptions, has_transformer_engine
from megatron_opdlm.responses.prompts import (
    Prompt,
    PromptTokens,
    TokenizedPrompts,
    tokenize_prompts,
)
from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.decodable import Decodable
from megatron_opdlm.rollout.engine import Observer, RolloutEngine
from megatron_opdlm.rollout.graph_support import require_graphs
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions, Request


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A student with its tokenizer and process groups. It decodes with any decoding options."""

    student: Student
    """Model, tokenizer and description of the student."""
    decodable: Decodable
    """The student in the parallel layout of decoding."""
    max_rows: int
    """Most sequences decoded at once on a data-parallel rank."""
    kv_cache_gb: float | None = None
    """Most memory for keys and values on a rank, in GB; None: see `rollout.cache`."""
    cuda_graphs: bool | None = None
    """Whether to capture passes as CUDA graphs; None captures them if possible."""

    @property
    def parallel(self) -> ParallelState:
        """Process groups of decoding."""
        return self.decodable.parallel

    @classmethod
    def open(
        cls,
        path: str,
        *,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        params_dtype: str = "auto",
        max_rows: int = 256,
        kv_cache_gb: float | None = None,
        cuda_graphs: bool | None = None,
        import_cache: str | None = None,
    ) -> Decoder:
        """Joins the job and loads a student. Call on all ranks.

        Args:
            path: run folder, checkpoint root, iteration folder, or Hugging Face directory.
            tensor_model_parallel_size: tensor-parallel size.
            pipeline_model_parallel_size: pipeline-parallel size.
            params_dtype: "float32", "bfloat16", or "auto": bfloat16 on CUDA, else float32.
            max_rows: most sequences decoded at once on a data-parallel rank.
            kv_cache_gb: most memory for keys and values on a rank, in GB.
            cuda_graphs: whether to capture passes as CUDA graphs; None captures them if possible.
            import_cache: folder in which a Hugging Face directory is converted and later found
                again; None uses a temporary folder, which is removed before this returns.

        Raises:
            ValueError: the path has neither a checkpoint nor a model, there is no mask token or no
                chat template, the parallel sizes do not divide the model, or CUDA graphs are
                impossible.
        """
        source = ModelSource.open(path)
        source.require_chat_template()
        parallel = process_groups.initialize(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
        )
        options = _build_options(params_dtype)
        if cuda_graphs:
            require_graphs(
                options.params_dtype,
                source.stored_config.kv_channels,
                sequence_parallel=options.sequence_parallel,
                fp8=options.fp8,
            )
        with _import_folder(import_cache, parallel) as folder:
            cache = ImportCache(folder=folder, mask_token=MASK_TOKEN)
            student = load_student(path, cache, options, parallel, mask_token=None)
        hf = student.description.config
        layout = RolloutLayout(
            student.model, hf, options, parallel, tensor_model_parallel_size=None, keep_memory=True
        )
        return cls(
            student=student,
            decodable=student.decodable(layout),
            max_rows=max_rows,
            kv_cache_gb=kv_cache_gb,
            cuda_graphs=cuda_graphs,
        )

    def prompt_room(
        self, options: DecodingOptions, response_limit: int, *, key: str = "max_new_tokens"
    ) -> int:
        """Returns the length of the longest prompt that leaves room for a response.

        Args:
            options: decoding options.
            response_limit: most response tokens.
            key: the user's name of `response_limit`, for messages.

        Raises:
            ValueError: the response alone is too long for the model's positions.
        """
        positions = self.student.model.max_sequence_length
        return prompt_room(positions, response_limit, options.block_size, key=key)

    def tokenize(
        self,
        prompts: Sequence[Prompt],
        options: DecodingOptions,
        *,
        response_limit: int,
        enable_thinking: bool = False,
    ) -> TokenizedPrompts:
        """Tokenises prompts, and drops those that leave no room for a response.

        The model's number of positions limits prompt and response together.

        Raises:
            ValueError: no prompt leaves room, or the response alone is too long.
        """
        room = self.prompt_room(options, response_limit)
        return tokenize_prompts(
            prompts,
            self.student.tokenizer,
            enable_thinking=enable_thinking,
            max_prompt_tokens=room,
        )

    def decode(
        self,
        prompts: Sequence[PromptTokens],
        options: DecodingOptions,
        *,
        response_limit: int,
        seed: int,
        on_progress: Callable[[int], None] | None = None,
        observer: Observer | None = None,
    ) -> list[Trajectory]:
        """Decodes one response per prompt. Call on all ranks with the same arguments.

        Args:
            prompts: tokenised prompts.
            options: decoding options.
            response_limit: most response tokens.
            seed: seed of the sampling. With temperature > 0, a response is a function of the seed
                and the prompt's id.
            on_progress: see `collect`.
            observer: called after each denoising step of each sequence, instead of `on_progress`.
                Every data-parallel rank then decodes all prompts instead of a share, so that one
                rank sees all of them.

        Returns:
            Trajectories in the order of the prompts; the same on every rank.
        """
        engine = RolloutEngine(
            self.decodable,
            options,
            max_rows=self.max_rows,
            kv_cache_gb=self.kv_cache_gb,
            cuda_graphs=self.cuda_graphs,
        )
        requests = [
            Request(
                prompt_id=prompt.id,
                sample=0,
                prompt_ids=prompt.ids,
                response_limit=response_limit,
                key=randomness.key(seed, "generate", prompt.id, 0),
            )
            for prompt in prompts
        ]
        if observer is not None:
            return engine.generate(requests, observer=observer)
        return collect(engine, requests, self.parallel, on_progress=on_progress)[0]


def chosen_dtype(asked: str) -> str:
    """Returns the type of the weights that `--params-dtype` means on this machine."""
    if asked != "auto":
        return asked
    return "bfloat16" if torch.cuda.is_available() else "float32"


def _build_options(params_dtype: str) -> BuildOptions:
    """Returns the build options of a student that only decodes, on this machine."""
    return BuildOptions(
        layer_spec="transformer_engine" if has_transformer_engine() else "local",
        params_dtype=DTYPES[chosen_dtype(params_dtype)],
    )


@contextlib.contextmanager
def _import_folder(given: str | None, parallel: ParallelState) -> Iterator[Path]:
    """Yields the folder for imports: the given one or a temporary one.

    The temporary folder is removed when all ranks have read it.
    """
    if given is not None:
        yield Path(given)
        return
    # Only the main rank has a signal handler. A handler runs only after the collective that its
    # rank is in, and the other ranks are in a collective most of the time. The signal itself ends
    # them, and so ends a collective that holds the main rank, too.
    with stopped_by_signals() if parallel.is_main else contextlib.nullcontext():
        scratch = from_main(lambda: tempfile.mkdtemp(prefix="opdlm_"), is_main=parallel.is_main)
        try:
            yield Path(scratch)
            dist.barrier()
        finally:
            if parallel.is_main:
                shutil.rmtree(scratch)
