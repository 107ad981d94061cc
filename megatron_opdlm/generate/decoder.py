"""A loaded student that answers prompts: what `opdlm generate`, `opdlm eval` and evaluation during
training share."""

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
    """A student with its tokenizer and process groups; every decoding setting runs on it."""

    student: Student
    """Model, tokenizer and description."""
    decodable: Decodable
    """The student in the layout that it is decoded in."""
    max_rows: int
    """Most sequences decoded at once on a data-parallel rank."""
    kv_cache_gb: float | None = None
    """Most memory for keys and values on a rank; None: see `rollout.cache`."""
    cuda_graphs: bool | None = None
    """Whether to capture passes as CUDA graphs; None: where they can be."""

    @property
    def parallel(self) -> ParallelState:
        """Process groups."""
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
            kv_cache_gb: most memory for keys and values on a rank.
            cuda_graphs: whether to capture passes as CUDA graphs; None: where they can be.
            import_cache: where a Hugging Face directory is converted, to be found again; None = a
                temporary folder, which is gone when this returns.

        Raises:
            ValueError: neither a checkpoint nor a model, no mask token or chat template, a model
                that the parallel sizes do not divide, or CUDA graphs where there can be none.
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

    def tokenize(
        self,
        prompts: Sequence[Prompt],
        options: DecodingOptions,
        *,
        response_limit: int,
        enable_thinking: bool = False,
    ) -> TokenizedPrompts:
        """Tokenises the prompts that leave room for a response in the model's positions.

        Raises:
            ValueError: no prompt does, or the response alone is too long.
        """
        positions = self.student.model.max_sequence_length
        room = positions - response_limit - (options.block_size - 1)
        if room < 1:
            raise ValueError(
                f"max_new_tokens={response_limit} with block_size={options.block_size} leaves no "
                f"room for a prompt in the model's {positions} positions; use "
                f"{max(1, positions // 2)} or less"
            )
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
            options: how blocks are denoised.
            response_limit: most response tokens.
            seed: with temperature > 0, a response is a function of this and the prompt's id.
            on_progress: see `collect`.
            observer: called after each denoising step of each row, in place of `on_progress`.
                Data-parallel ranks then all decode everything, instead of a share each, so that
                one of them sees it all.

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


def _build_options(params_dtype: str) -> BuildOptions:
    """How a student is built that only decodes, on this machine."""
    if params_dtype == "auto":
        params_dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return BuildOptions(
        layer_spec="transformer_engine" if has_transformer_engine() else "local",
        params_dtype=DTYPES[params_dtype],
    )


@contextlib.contextmanager
def _import_folder(given: str | None, parallel: ParallelState) -> Iterator[Path]:
    """The folder for imports: the given one, or one that goes when every rank has read it."""
    if given is not None:
        yield Path(given)
        return
    # On the main rank alone: a handler has to wait for a collective that the rank is in, and the
    # others wait for this one most of the time. They end by the signal itself, and with them
    # whatever collective holds this rank.
    with stopped_by_signals() if parallel.is_main else contextlib.nullcontext():
        scratch = from_main(lambda: tempfile.mkdtemp(prefix="opdlm_"), is_main=parallel.is_main)
        try:
            yield Path(scratch)
            dist.barrier()
        finally:
            if parallel.is_main:
                shutil.rmtree(scratch)
