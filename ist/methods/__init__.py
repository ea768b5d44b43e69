"""What IST is compared with, on the same model, data and processes.

`METHODS` maps the names of methods to import paths of classes made from
(job, membership, model, state, meter). Their ranks are all workers and call `train_round` together.
"""

METHODS = {
    "ddp": "ist.methods.ddp:DataParallel",
    "ddp_fp16": "ist.methods.ddp:DataParallel",
    "ddp_bf16": "ist.methods.ddp:DataParallel",
    "powersgd": "ist.methods.ddp:DataParallel",
    "local_sgd": "ist.methods.local:LocalTraining",
    "diloco": "ist.methods.local:LocalTraining",
    "diloco_int8": "ist.methods.local:LocalTraining",
}
