"""What IST is compared with, on the same model, data and processes.

`METHODS` maps the names of methods to import paths of classes made from
(job, membership, model, state, meter). Their ranks are all workers and call `train_round` together.
"""

METHODS = {"ddp": "ist.methods.ddp:DataParallel"}
