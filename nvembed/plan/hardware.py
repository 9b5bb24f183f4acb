"""Machines that a plan can be made for: a catalogue, and others from YAML files.

Peaks are the makers' dense bf16 numbers. Prices are examples of on-demand list prices, whole machine; set your own.

`laptop` was measured. Of GPUs one H100 was. Training, with one model (`tests/benchmarks/gpu_training.py`: LoRA on a
decoder of 28 layers x 1,024): 3,800, 12,800, 18,200 and 22,500 tokens a second with slices of 1,024, 4,096, 8,192 and
16,384 tokens, at most 6 % of the peak, 21 us a launch. Two numbers rest on those four: seconds of launches
per layer and slice, and a share of the peak that grows with the model's width. That wide models reach `mfu` on a GPU is
assumed.
Encoding and search there: see `encoding.py` and `searching.py`.
"""

from __future__ import annotations

from typing import Literal

import yaml
from pydantic import Field, ValidationError

from nvembed.core import storage
from nvembed.core.arguments import nearest
from nvembed.types import Config, UserError

ASSUMED_MFU = 0.35
ASSUMED_SOURCE = (
    "assumed, for models of width 4,096 and more, narrower ones in proportion (fits what one H100 reached with width "
    "1,024: 5-6 % of the peak, launches included)"
)
FULL_WIDTH = 4096
LAUNCH_SECONDS = 21e-6  # measured on the H100's host


class Hardware(Config):
    """One machine.

    `mfu` is the share of the peak that computed operations reach; recomputation counts, waiting for launches does not.
    """

    name: str = Field(description="Name of the machine in the plan.")
    device: str = Field(description="Name of one device in the plan.")
    kind: Literal["gpu", "cpu"] = Field("gpu", description="Kind of the devices.")
    devices: int = Field(ge=1, description="Number of GPUs, or cores of a CPU.")
    memory_gib: float = Field(gt=0, description="Memory in GiB of one device; of the whole machine where kind is cpu.")
    peak_tflops: float = Field(gt=0, description="Dense bf16 TFLOP/s of one device.")
    bandwidth_gb_s: float = Field(gt=0, description="Memory bandwidth of one device, GB/s.")
    link_gb_s: float = Field(gt=0, description="Bandwidth from one device to the others, GB/s.")
    mfu: float = Field(ASSUMED_MFU, gt=0, le=1, description="Share of peak_tflops that computed operations reach.")
    mfu_source: str = Field(ASSUMED_SOURCE, description="Where mfu comes from; printed with the plan.")
    full_width: int | None = Field(
        None, ge=1, description="Width from which models reach mfu; narrower ones reach less in proportion."
    )
    launch_seconds: float = Field(0.0, ge=0, description="Seconds to launch one GPU kernel from Python.")
    start_seconds: float = Field(
        60.0, ge=0, description="Seconds until workers or actors have started and loaded a model."
    )
    price_per_hour: float | None = Field(None, ge=0, description="Price of the whole machine for an hour.")
    price_source: str = Field("example", description="Where the price comes from; printed with the plan.")


_GPUS = (
    # name, device, devices, GiB, TFLOP/s, GB/s, link GB/s, price
    ("h100x1", "NVIDIA H100 SXM 80 GB", 1, 79.6, 989, 3350, 64, 6.90),
    ("h100x8", "NVIDIA H100 SXM 80 GB", 8, 79.6, 989, 3350, 450, 55.00),
    ("h200x8", "NVIDIA H200 SXM 141 GB", 8, 139.8, 989, 4800, 450, 63.00),
    ("a100-80gx1", "NVIDIA A100 SXM 80 GB", 1, 79.1, 312, 2039, 64, 5.10),
    ("a100-80gx8", "NVIDIA A100 SXM 80 GB", 8, 79.1, 312, 2039, 300, 41.00),
    ("l40sx4", "NVIDIA L40S 48 GB", 4, 44.5, 362, 864, 32, 10.50),
    ("l4x1", "NVIDIA L4 24 GB", 1, 22.0, 121, 300, 32, 0.80),
    ("l4x4", "NVIDIA L4 24 GB", 4, 22.0, 121, 300, 32, 4.60),
)
CATALOGUE = {
    name: Hardware(
        name=name, device=device, devices=count, memory_gib=memory, peak_tflops=peak, bandwidth_gb_s=bandwidth,
        link_gb_s=link, price_per_hour=price, full_width=FULL_WIDTH, launch_seconds=LAUNCH_SECONDS,
    )
    for name, device, count, memory, peak, bandwidth, link, price in _GPUS
}  # fmt: skip
CATALOGUE["laptop"] = Hardware(
    name="laptop",
    device="core of an AMD EPYC with avx512_bf16",
    kind="cpu",
    devices=2,
    memory_gib=24,
    peak_tflops=0.224,
    bandwidth_gb_s=20,
    link_gb_s=10,
    mfu=0.29,
    mfu_source="measured: the quickstart's training steps on 2 cores",
    start_seconds=25,
    price_per_hour=0.0,
    price_source="your own machine",
)
CORE = CATALOGUE["laptop"]  # a CPU actor on a machine with GPUs is planned with these cores


def find_hardware(name: str) -> Hardware:
    """A machine of the catalogue, or of a YAML file with the fields of `Hardware`.

    Raises:
        UserError: no such machine or file, or the file does not describe a machine.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    if not name.endswith((".yaml", ".yml")):
        known = ", ".join(CATALOGUE)
        raise UserError(
            f"--hardware {name}: not in the catalogue.{nearest(name, list(CATALOGUE))} It has: {known}. "
            "A YAML file describes another machine."
        )
    try:
        return Hardware.model_validate(yaml.safe_load(storage.read_bytes(name)))
    except FileNotFoundError as error:
        raise UserError(f"--hardware {name}: no such file.") from error
    except (ValidationError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"--hardware {name}: {error}") from error
