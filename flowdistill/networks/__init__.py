"""Networks on the linear path: backbones, velocity networks, critics, adapters and attention kernels."""
