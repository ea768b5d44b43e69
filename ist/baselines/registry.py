"""What IST is compared with, on the same model, data and processes.

`METHODS` maps the names of methods to import paths of classes made from
(job, membership, model, state, meter). Their ranks are all workers and call `train_round` together.
"""

METHODS = {
    "ddp": "ist.baselines.ddp:DataParallel",
    "ddp_fp16": "ist.baselines.ddp:DataParallel",
    "ddp_bf16": "ist.baselines.ddp:DataParallel",
    "powersgd": "ist.baselines.ddp:DataParallel",
    "local_sgd": "ist.baselines.local_sgd:LocalTraining",
    "diloco": "ist.baselines.local_sgd:LocalTraining",
    "diloco_int8": "ist.baselines.local_sgd:LocalTraining",
}
