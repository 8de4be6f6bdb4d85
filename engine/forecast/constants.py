"""Every constant of the forecast in one table: its value, its unit and where it comes from. What follows from the model's sizes
and the configuration is computed elsewhere and is not here.

A constant is from a *data sheet*, *measured* (on what, is said), or a *guess*. No guess about a GPU has been verified on one; a
calibration file (calibration.py) replaces any of them by what was measured on the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.capacity.transfer import Machine
from engine.config.options import NonNegativeFloat, PositiveFloat, Section, Unit

Kind = Literal["data sheet", "measured", "guess"]
LINKS = Machine()


def _constant(value: float, kind: Kind, source: str, description: str) -> Any:
    return Field(value, description=description, json_schema_extra={"kind": kind, "source": source})


Rate = Annotated[PositiveFloat, Unit("GB/s")]
Teraflops = Annotated[PositiveFloat, Unit("TFLOP/s")]
Cost = Annotated[NonNegativeFloat, Unit("s")]
Count = Annotated[NonNegativeFloat, Unit("cores")]
Part = Annotated[float, Field(gt=0, le=1), Unit("of 1")]

UNVERIFIED = "unverified on GPU"


class Constants(Section):
    """What a machine does in a second. The values here are those of H200s; a CPU needs a calibration."""

    peak_teraflops: Teraflops = _constant(
        989.0, "data sheet", "NVIDIA H200 SXM, dense bfloat16", "of one device, products in model.dtype"
    )
    memory_gigabytes_per_second: Rate = _constant(4800.0, "data sheet", "NVIDIA H200 SXM", "of one device's memory")
    nvlink_gigabytes_per_second: Rate = _constant(
        LINKS.nvlink_gigabytes_per_second, "guess", UNVERIFIED, "of one GPU, inside a node"
    )
    network_gigabytes_per_second: Rate = _constant(
        LINKS.network_gigabytes_per_second, "guess", UNVERIFIED, "of one GPU, between nodes"
    )
    disk_gigabytes_per_second: Rate = _constant(
        2.0, "guess", "a shared file system", "written by all ranks together, and read by all nodes"
    )
    digest_gigabytes_per_second: Rate = _constant(
        1.45, "measured", "one core of a server, docs/results.md", "of a checkpoint hashed by one rank's thread"
    )
    host_copy_gigabytes_per_second: Rate = _constant(
        20.0, "guess", UNVERIFIED, "from a device to its host's memory, each device"
    )
    host_memory_gigabytes_per_second: Rate = _constant(
        100.0, "guess", UNVERIFIED, "of a node's host, for optimizer.offload_share, shared by its devices"
    )
    cores: Count = _constant(
        0.0,
        "data sheet",
        "GPUs",
        "of a machine without GPUs, on which trainer, engines and rewards compute together: all of them by what one computes "
        "alone; 0: everybody has devices of his own",
    )
    # -- training
    train_peak_share: Part = _constant(
        0.40, "guess", UNVERIFIED, "of the peak that a row's products and attention reach in training"
    )
    fp8_factor: Annotated[PositiveFloat, Unit("times")] = _constant(
        1.4, "guess", UNVERIFIED, "how much faster products of FP8 are: the layers' with trainer.fp8, engines' when quantized"
    )
    overlap_share: Annotated[float, Field(ge=0, le=1), Unit("of 1")] = _constant(
        0.7,
        "guess",
        UNVERIFIED,
        "of communication that trainer.overlap_tensor_parallel hides, and trainer.overlap_gradients at most",
    )
    layer_row_seconds: Cost = _constant(
        1e-4, "guess", f"launches of some 20 kernels, {UNVERIFIED}", "of a layer's forward of a row, whatever its length"
    )
    sum_seconds: Cost = _constant(
        1.2e-5,
        "guess",
        UNVERIFIED,
        "of a sum over trainer ranks beside its bytes; two a layer and pass with tensor_parallel",
    )
    step_seconds: Cost = _constant(
        0.03, "guess", UNVERIFIED, "of an optimizer step, whatever its rows: metrics, clip, launches"
    )
    hop_seconds: Cost = _constant(5e-5, "guess", UNVERIFIED, "a message between pipeline stages takes beside its bytes")
    # -- sampling
    decode_memory_share: Part = _constant(0.7, "guess", UNVERIFIED, "of memory bandwidth that decoding reaches")
    decode_peak_share: Part = _constant(0.4, "guess", UNVERIFIED, "of the peak that decoding's products reach in large batches")
    prefill_peak_share: Part = _constant(0.4, "guess", UNVERIFIED, "of the peak that a prompt's products reach")
    iteration_seconds: Cost = _constant(0.003, "guess", UNVERIFIED, "of one decoding iteration beside the model's own work")
    request_iteration_seconds: Cost = _constant(
        5e-6, "guess", UNVERIFIED, "of one decoding iteration for each request: sampler, scheduler, detokenizer"
    )
    collective_seconds: Cost = _constant(
        1.2e-5, "guess", UNVERIFIED, "of a sum over an engine's tensor-parallel ranks; two a layer and iteration"
    )
    # -- between
    sync_seconds: Cost = _constant(0.05, "guess", UNVERIFIED, "of a weight sync beside its transfers: messages, checksums")
    sleep_seconds: Cost = _constant(1.0, "guess", UNVERIFIED, "colocated: for the engines to sleep and to wake, both together")
    sampled_megatoken_seconds: Cost = _constant(
        0.04, "measured", "one core of a server", "rank 0 spends on a million sampled tokens: metrics; a thread writes records"
    )
    trained_megatoken_seconds: Cost = _constant(
        0.06, "measured", "one core of a server, docs/results.md", "of dealing, sending and packing a million training tokens"
    )
    verified_per_second: Annotated[PositiveFloat, Unit("answers/s")] = _constant(
        240.0, "measured", "one core of a server, docs/results.md", "that one worker of `rewards.workers` judges with 'math'"
    )
    function_per_second: Annotated[PositiveFloat, Unit("answers/s")] = _constant(
        1000.0,
        "guess",
        "a function that reads text; yours may call a service",
        "that one judging process does with your function, or one call at a time of your class",
    )
    start_seconds: Cost = _constant(
        180.0, "guess", UNVERIFIED, "from the command to the first step, beside reading the weights"
    )
    # -- bytes
    ledger_token_bytes: Annotated[PositiveFloat, Unit("bytes")] = _constant(
        5.7, "measured", "docs/results.md, the larger of two kinds of text", "of a sampled token in the run's records"
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A constant for people and for the JSON file."""

    name: str
    value: float
    unit: str
    kind: Kind
    source: str
    meaning: str


def rows(constants: Constants, measured: dict[str, str] | None = None) -> list[Row]:
    """The table. `measured`: of each constant that a calibration gives, where it was measured."""
    found = []
    for name, field in Constants.model_fields.items():
        told: Any = field.json_schema_extra
        kind, source = told["kind"], told["source"]
        if name in (measured or {}):
            kind, source = "measured", (measured or {})[name]
        unit = next(mark.name for mark in field.metadata if isinstance(mark, Unit))
        found.append(Row(name, getattr(constants, name), unit, kind, source, str(field.description)))
    return found
