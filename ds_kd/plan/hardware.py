"""Named GPUs and networks: what their makers print about memory, arithmetic and links, for
estimates of time.

Peaks are of dense bf16 products without structured sparsity, which the data sheets of Hopper and
later print twice as high. A link's rate is that of one direction; data sheets add up both. Sources:
NVIDIA's data sheets of A100 (nvidia-a100-datasheet-us-nvidia-1758950-r4), H100 and H200 (SXM),
Blackwell (HGX B200) and L40S, and for the network the user guides of DGX A100, H100, H200 and B200:
one adapter for each GPU, of 200 Gb/s (A100) or 400 Gb/s. An L40S has no NVLink and, as assumed
here, an adapter of 200 Gb/s. A network's rate is that of one port: InfiniBand's generations with
four lanes, and Ethernet's by their names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU of a server of eight.

    Args:
        name: as people call it.
        memory: bytes.
        tflops: peak of dense bf16 products, 10¹² operations per second.
        bandwidth: of its memory, bytes per second.
        link: to the other GPUs of its node, bytes per second and direction.
        network: its share of the node's adapters, bytes per second and direction.
        host_link: to the host's memory, bytes per second and direction.
    """

    name: str
    memory: int
    tflops: float
    bandwidth: float
    link: float
    network: float
    host_link: float


#: By the name that a command line takes.
GPUS = {
    "a100-40gb": Gpu("A100 40GB SXM", 40 * 10**9, 312.0, 1.555e12, 3e11, 2.5e10, 3.2e10),
    "a100": Gpu("A100 80GB SXM", 80 * 10**9, 312.0, 2.039e12, 3e11, 2.5e10, 3.2e10),
    "h100": Gpu("H100 SXM", 80 * 10**9, 989.0, 3.35e12, 4.5e11, 5e10, 6.4e10),
    "h200": Gpu("H200 SXM", 141 * 10**9, 989.0, 4.8e12, 4.5e11, 5e10, 6.4e10),
    "b200": Gpu("B200 SXM", 180 * 10**9, 2250.0, 8e12, 9e11, 5e10, 6.4e10),
    "l40s": Gpu("L40S", 48 * 10**9, 362.0, 0.864e12, 3.2e10, 2.5e10, 3.2e10),
}
#: Gbit/s of a port, by the name that a command line takes.
NETWORKS = {
    "edr": 100.0, "hdr": 200.0, "ndr": 400.0, "xdr": 800.0,
    "10gbe": 10.0, "25gbe": 25.0, "100gbe": 100.0, "200gbe": 200.0, "400gbe": 400.0,
}  # fmt: skip
