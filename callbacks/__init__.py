"""Lightning callbacks: annealing, entropy, and what the quantizers and the network traffic are doing."""

from lightning_n2uq.callbacks.batch_norm_reestimation import BatchNormReestimation
from lightning_n2uq.callbacks.communication_monitor import CommunicationMonitor
from lightning_n2uq.callbacks.entropy_regularizer import EntropyRegularizer
from lightning_n2uq.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from lightning_n2uq.callbacks.oscillation_control import OscillationControl
from lightning_n2uq.callbacks.proximal_annealing import ProximalAnnealing
from lightning_n2uq.callbacks.quantization_monitor import QuantizationMonitor
from lightning_n2uq.callbacks.quantize_model import QuantizeModel
from lightning_n2uq.callbacks.range_initialization import RangeInitialization
from lightning_n2uq.callbacks.simulated_ranks import SimulatedRanks
from lightning_n2uq.callbacks.threshold_annealing import ThresholdAnnealing
from lightning_n2uq.callbacks.torch_compile import TorchCompile

__all__ = [
    "BatchNormReestimation",
    "CommunicationMonitor",
    "EntropyRegularizer",
    "NonFiniteError",
    "NonFiniteGuard",
    "OscillationControl",
    "ProximalAnnealing",
    "QuantizationMonitor",
    "QuantizeModel",
    "RangeInitialization",
    "SimulatedRanks",
    "ThresholdAnnealing",
    "TorchCompile",
]
