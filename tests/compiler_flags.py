"""XLA's flags in tests: compiling takes most of their time, and what they assert holds for any correct program."""

from importlib.metadata import version

_JAXLIB = tuple(int(part) for part in version("jaxlib").split(".")[:2])

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if _JAXLIB < (0, 11):  # unknown to later ones
    QUICK += " --xla_cpu_use_fusion_emitters=false"
# On a busy machine a device may come late to where all wait for each other; only one that hangs ends the program.
# Processes with one device and with several find each other's programs, as all flags but the number are the same.
QUICK += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
