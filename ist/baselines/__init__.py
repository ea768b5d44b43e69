"""What IST is compared with, on the same model, data and processes: data-parallel training, local SGD, DiLoCo."""
