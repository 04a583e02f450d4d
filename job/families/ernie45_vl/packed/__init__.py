"""Training without padding and without waiting for the device.

The rows of a batch are one sequence (what TRL calls `padding_free`); every index that the model
would otherwise work out on the device is made by the data workers. The modules are those of
Transformers, adapters and all: only the order in which they are called is written here.
"""
