"""Measuring a machine with PyTorch: kernels, streams, copies and collectives, into profiles. torch is loaded lazily."""
