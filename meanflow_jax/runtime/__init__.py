"""Devices, disks and processes; knows no MeanFlow."""
