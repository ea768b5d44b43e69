"""Faults that the quick tests must detect: each replaces a line of the code.

Where it sits: `tests/mutants/run.py` applies one fault at a time to a copy of the code and runs its test files. A fault
whose line no longer exists is an error: find the line that does the same now, or another fault for the function.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A line of the code, its replacement, and the test files, of which at least one must then fail.

    Attributes:
        what: The fault, in words.
        file: Relative to the repository.
        old: Text that stands in the file exactly once.
        new: What takes its place.
        tests: Files of quick tests.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # The coordinator's merge
    Fault(
        "values that are not finite are merged", "ist/training/coordinator.py",
        "            self._check_finite(header, result.buffers.up.tensors, arrivals.num_workers)\n", "", ("tests/training/test_coordinator.py",),
    ),
    Fault(
        "any number of workers is enough", "ist/training/coordinator.py",
        "if self.num_workers - len(self.lost) < self._needed:", "if self.num_workers - len(self.lost) < 0:", ("tests/training/test_coordinator.py",),
    ),
    Fault(
        "the loss of a round is the mean over workers, not over samples", "ist/training/coordinator.py",
        'for of_worker in measured) / numbers["samples"]', "for of_worker in measured) / len(measured)",
        ("tests/training/test_one_worker.py", "tests/training/test_coordinator.py"),
    ),
    # Extracting and merging
    Fault(
        "what is averaged is read after the next result has overwritten it", "ist/subnet/cut.py",
        "tensors if are_lasting else {name: tensors[name].clone() for name in shared}", "tensors",
        ("tests/pools/test_ranks.py",),
    ),
    Fault("subnets are merged in order of arrival", "ist/subnet/cut.py", "            workers.sort()\n", "", ("tests/subnet/test_subnet.py",)),
    Fault(
        "an entry with two holders gets the value of the last one", "ist/subnet/cut.py", "torch.where(count > 1, mean, merged)",
        "torch.where(count > 2, mean, merged)", ("tests/subnet/test_subnet.py",),
    ),
    Fault(
        "updates of carried optimizer state are scaled", "ist/training/coordinator.py",
        "UpdateScale(frozenset(self._trained), ", "UpdateScale(frozenset(self._store.tensors()), ", ("tests/training/test_merge_scale.py",),
    ),
    Fault(
        "the mean of several workers moves by the factor of own weights", "ist/subnet/cut.py", "clamp(min=1)).mul_(shared)",
        "clamp(min=1)).mul_(own)", ("tests/training/test_merge_scale.py",),
    ),
    Fault(
        "the largest factor is always chosen", "ist/training/scale_search.py", "factors[losses.index(best)]", "factors[0]",
        ("tests/training/test_merge_scale.py",),
    ),
    Fault(
        "a factor is tried on top of the one before", "ist/training/scale_search.py", "tensor.copy_(self._before[name])", "pass",
        ("tests/training/test_merge_scale.py",),
    ),
    Fault(
        "a tensor that slots cover partly counts as exclusive", "ist/subnet/cut.py",
        "for number, slot in slots) == specs[name].shape[dim]", "for number, slot in slots) <= specs[name].shape[dim]",
        ("tests/subnet/test_subnet.py",),
    ),
    # Assigning neurons
    Fault(
        "neurons of the remainder have no owner", "ist/subnet/partition.py",
        "return [len(range(worker, size, num_workers)) for worker in range(num_workers)]",
        "return [size // num_workers for worker in range(num_workers)]", ("tests/subnet/test_partition.py",),
    ),
    Fault(
        "every round has the partition of the first", "ist/subnet/partition.py",
        "Purpose.PARTITION, group.round_number, group.number)\n",
        "Purpose.PARTITION, 0, group.number)\n", ("tests/subnet/test_partition.py",),
    ),
    Fault(
        "balanced shares of all groups move by the same number of workers", "ist/subnet/partition.py",
        "shares[(worker + turn * group.number) % group.num_workers]", "shares[(worker + turn) % group.num_workers]",
        ("tests/subnet/test_partition.py", "tests/subnet/test_coverage.py"),
    ),
    # Local steps
    Fault(
        "local steps are not seeded", "ist/loops/part.py",
        "with part.counted(), seeded(self.device, self._seed, Purpose.TRAINING, *key):",
        "with part.counted():",
        ("tests/pools/test_ranks.py",),
    ),
    Fault(
        "all workers draw the same random numbers", "ist/loops/part.py",
        "if part.rank else (round_number, part.worker)", "if part.rank else (round_number, 0)",
        ("tests/training/test_random_state.py", "tests/pools/test_ranks.py"),
    ),
    Fault(
        "the gradients of micro-batches are summed", "ist/loops/local_step.py",
        "share = found.loss if len(parts) == 1 else found.loss / (len(batch) / len(part))", "share = found.loss",
        ("tests/training/test_local_step.py",),
    ),
    Fault(
        "logged numbers of all micro-batches have the same weight", "ist/loops/local_step.py",
        "found.values[name] * len(part) / len(batch)", "found.values[name] / len(parts)",
        ("tests/training/test_step_function.py",),
    ),
    Fault(
        "gradients are not clipped", "ist/loops/local_step.py",
        "                nn.utils.clip_grad_norm_(parameters, self._max_norm)\n", "                pass\n",
        ("tests/training/test_local_step.py",),
    ),
    Fault(
        "the loss is not computed under autocast", "ist/loops/local_step.py",
        "        with self.precision():\n", "        with nullcontext():\n", ("tests/training/test_local_step.py",),
    ),
    Fault(
        "a rank with fewer samples counts as much as the others of its worker", "ist/loops/local_step.py",
        "weighted = share if weight == 1 else share * weight", "weighted = share", ("tests/pools/test_inside.py",),
    ),
    Fault(
        "each rank of a worker takes the whole batch", "ist/data/loading/loader.py",
        "return micro_batches(self.sampler.batch(self.worker, step), self.ranks)[self.rank]",
        "return self.sampler.batch(self.worker, step)", ("tests/pools/test_inside.py",),
    ),
    Fault(
        "data-parallel training sends the gradients of every micro-batch", "ist/loops/local_step.py",
        "return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()",
        "return nullcontext()", ("tests/baselines/test_methods.py",),
    ),
    Fault(
        "an average over steps counts a round as one", "ist/training/average.py",
        'self._settings.decay ** report.numbers["steps"]', "self._settings.decay", ("tests/training/test_recipe.py",),
    ),
    Fault(
        "gradients add up over steps", "ist/loops/local_step.py", "        optimizer.zero_grad(set_to_none=True)\n", "",
        ("tests/training/test_one_worker.py",),
    ),
    Fault(
        "a worker of a skewed split may have no sample", "ist/data/shards/dirichlet.py",
        "    _leave_none_empty(owner, num_workers)\n    return", "    return", ("tests/data/test_shards.py",),
    ),
    Fault(
        "own data travel with the run", "ist/data/shards/unequal.py", 'return {"_load": self._load, "_loaded": {}}',
        "return vars(self)", ("tests/runs/test_own_data.py",),
    ),
    Fault(
        "samples in memory are not compared", "ist/data/fingerprint.py", "form = zlib.crc32(tensor.numpy().data, form)", "pass",
        ("tests/data/test_fingerprint.py",),
    ),
    Fault(
        "a re-estimation reads its samples every time", "ist/evaluation/evaluate.py", "self._kept = kept or []", "self._kept = []",
        ("tests/evaluation/test_evaluate.py",),
    ),
    Fault(
        "every step trains on the samples of the first", "ist/data/loading/loader.py", "self.sampler.batch(self.worker, step)",
        "self.sampler.batch(self.worker, 0)", ("tests/training/test_one_worker.py",),
    ),
    Fault(
        "the items of a batch draw the same random numbers", "ist/data/batches.py", "        seed(place)\n",
        "        seed(0)\n", ("tests/data/test_loader.py",),
    ),
    Fault(
        "every epoch draws the same random numbers for an item", "ist/data/loading/loader.py",
        "self.sampler.epoch(self.worker, step))", "0)", ("tests/data/test_loader.py",),
    ),
    Fault(
        "a loader process that has read ahead is not told to skip", "ist/data/loading/loader.py",
        "            self._feed.next = number\n        batch, error", "            pass\n        batch, error", ("tests/data/test_loader.py",),
    ),
    Fault(
        "all workers read the same items of a stream", "ist/data/loading/stream.py",
        "position * self._num_parts + self._number", "position * self._num_parts", ("tests/data/test_stream.py",),
    ),
    Fault(
        "every step has the settings of the first", "ist/loops/part.py", "self._groups, schedule.settings[self.step])",
        "self._groups, schedule.settings[0])", ("tests/training/test_one_worker.py",),
    ),
    # Optimizers
    Fault(
        "the settings of a parameter group are not used", "ist/optimization/parameter_groups.py",
        "found.append({\"params\": part, **settings, **own})", "found.append({\"params\": part, **settings})",
        ("tests/optimization/test_configured_groups.py",),
    ),
    Fault(
        "an optimizer of another network is accepted", "ist/optimization/factory.py", "            if id(parameter) not in own:",
        "            if False:", ("tests/optimization/test_factories.py",),
    ),
    Fault(
        "Muon is made with AdamW's learning rate", "ist/optimization/muon.py",
        "matrices, lr=lr, weight_decay=weight_decay, momentum=momentum",
        "matrices, lr=(adamw or {}).get(\"lr\", lr), weight_decay=weight_decay, momentum=momentum", ("tests/optimization/test_muon.py",),
    ),
    Fault(
        "a factor by step is asked for the first step only", "ist/optimization/schedulers.py", "        value = function(step, **args)",
        "        value = function(0, **args)", ("tests/optimization/test_schedule_functions.py",),
    ),
    # Worker state
    Fault(
        "a kept optimizer is used for other neurons", "ist/training/worker_state.py", "    return all(map(np.array_equal, neurons, others))",
        "    return True", ("tests/pools/test_ranks.py",),
    ),
    # Runs with changed keys
    Fault(
        "a kept optimizer keeps the settings of a schedule that was removed", "ist/training/worker_state.py",
        "changed = self._location.changed if is_resumed else ()", "changed = ()", ("tests/runs/test_changed_run.py",),
    ),
    Fault(
        "a changed seed is accepted", "ist/storage/reopen.py", "    if refused := refused_changes(before, config):",
        "    if refused := ():", ("tests/runs/test_changed_run.py",),
    ),
    Fault(
        "an edited configuration is not noticed", "ist/storage/saved_config.py", "return found[-1] != _digest(text) if found else None",
        "return None", ("tests/storage/test_same_run.py",),
    ),
    # Messages
    Fault(
        "a header's fingerprint is not compared", "ist/transport/message.py",
        "expected = (self.layout.fingerprint, round_number, worker)", "expected = (found, round_number, worker)",
        ("tests/pools/test_ranks.py",),
    ),
    Fault(
        "a message of another round is accepted", "ist/transport/message.py",
        "expected = (self.layout.fingerprint, round_number, worker)",
        "expected = (self.layout.fingerprint, header.round_number, worker)", ("tests/training/test_coordinator.py",),
    ),
    Fault(
        "a layout's fingerprint is the same for other dtypes", "ist/transport/message.py", "{name}:{spec.shape}:{spec.dtype}",
        "{name}:{spec.shape}", ("tests/pools/test_ranks.py",),
    ),
    # Measured numbers
    Fault(
        "seconds of workers that take turns are not added", "ist/measurements.py",
        '"elapsed": max if parallel else sum', '"elapsed": max', ("tests/test_measurements.py",),
    ),
    Fault(
        "a total is summed again for Prometheus", "ist/monitoring/exporters.py",
        ' and measured.over_rounds != "total"', "", ("tests/test_measurements.py",),
    ),
    Fault(
        "a header may lack what a worker measures", "ist/transport/message.py", "        check_worker(self.numbers)\n",
        "        pass\n", ("tests/test_measurements.py",),
    ),
    # Checkpoints
    Fault(
        "a checkpoint without a checksum is accepted", "ist/storage/checkpoint.py",
        "    if expected != _checksum(tensors, metadata):", "    if expected is not None and expected != _checksum(tensors, metadata):",
        ("tests/storage/test_checkpoint.py", "tests/pools/test_ranks.py"),
    ),
    Fault(
        "a checksum does not cover the values", "ist/storage/checkpoint.py",
        "    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)\n", "", ("tests/storage/test_checkpoint.py",),
    ),
    Fault(
        "a checksum does not cover the metadata", "ist/storage/checkpoint.py", "json.dumps(dict(metadata), sort_keys=True).encode()",
        'b""', ("tests/storage/test_checkpoint.py",),
    ),
    Fault(
        "worker state of other neurons is restored", "ist/storage/checkpoint.py",
        'return tensors if metadata.get("of") == of else None', "return tensors", ("tests/storage/test_checkpoint.py",),
    ),
    Fault(
        "a damaged file of a checkpoint in shards is accepted", "ist/storage/shards/read.py",
        "if verify and _sum(storage, path, size) != expected.sha256:", "if False:", ("tests/storage/test_shards.py",),
    ),
    Fault(
        "a rank reads the rows from the start of the tensor", "ist/storage/shards/read.py",
        "place.start + start * each", "place.start", ("tests/storage/test_shards.py",),
    ),
    Fault(
        "a checkpoint in shards is valid without the files of other ranks", "ist/storage/shards/write.py",
        "        if size != written[file.name].bytes:", "        if False:", ("tests/storage/test_shards.py",),
    ),
    # Evaluation
    Fault(
        "evaluation leaves the network in evaluation mode", "ist/evaluation/evaluate.py",
        "    with preserve_modes(model), _preserve_tensors(model), torch.no_grad(), closing(batches):\n",
        "    with _preserve_tensors(model), torch.no_grad(), closing(batches):\n", ("tests/evaluation/test_evaluate.py",),
    ),
    Fault(
        "a small last batch weighs as much as a full one", "ist/evaluation/evaluate.py",
        "float(loss_of(loss, outputs, targets, numbers)) * len(batch)",
        "float(loss_of(loss, outputs, targets, numbers)) * batch_size", ("tests/evaluation/test_evaluate.py",),
    ),
    Fault(
        "statistics are a moving average of batches", "ist/evaluation/evaluate.py", "            norm.momentum = None  #", "            pass  #",
        ("tests/evaluation/test_evaluate.py",),
    ),
    # Bytes
    Fault(
        "what is sent is counted twice", "ist/pools/torchrun.py", "self._meter.sent[worker] += flat.nbytes",
        "self._meter.sent[worker] += 2 * flat.nbytes", ("tests/pools/test_ranks.py",),
    ),
    Fault(
        "what is received is counted twice", "ist/pools/torchrun.py", "self._meter.received[worker] += flat.nbytes",
        "self._meter.received[worker] += 2 * flat.nbytes", ("tests/pools/test_ranks.py",),
    ),
    Fault(
        "bytes in one direction are not counted", "ist/monitoring/meter.py", "return self.sent.total() + self.received.total()",
        "return self.sent.total()", ("tests/pools/test_ranks.py",),
    ),
    # The round loop
    Fault(
        "the last round is not saved", "ist/training/rounds.py", "if last or ends or config.checkpoint.is_due(rounds_done):",
        "if config.checkpoint.is_due(rounds_done):", ("tests/pools/test_ranks.py",),
    ),
    Fault(
        "rounds are evaluated one too early", "ist/training/rounds.py", "(last or rounds_done % every == 0)",
        "(last or round_number % every == 0)", ("tests/pools/test_ranks.py",),
    ),
    # Callbacks
    Fault(
        "a run that a callback ends is not evaluated", "ist/training/rounds.py", "        if ends and metrics is None:\n",
        "        if False:\n", ("tests/monitoring/test_callbacks.py",),
    ),
    Fault(
        "a run that a callback ends is not saved", "ist/training/rounds.py", "if last or ends or config", "if last or config",
        ("tests/monitoring/test_callbacks.py",),
    ),
    Fault(
        "callbacks receive the records themselves", "ist/monitoring/observers.py",
        "getattr(callback, event)(copy.deepcopy(dict(record)))", "getattr(callback, event)(record)", ("tests/monitoring/test_callbacks.py",),
    ),
    Fault(
        "the state of workers is deleted when a callback ends a run", "ist/storage/run_folder.py",
        "        if not self.stopped_early():\n", "        if True:\n", ("tests/monitoring/test_callbacks.py",),
    ),
    Fault(
        "early stopping forgets the rounds before a resumption", "ist/callbacks/early_stopping.py",
        "        for record in run.history:\n            self.on_round(record)\n", "", ("tests/callbacks/test_shipped.py",),
    ),
    # Quantization
    Fault(
        "numbers are rounded down", "ist/transport/quantize.py", "[:, None]).round_()", "[:, None]).floor_()", ("tests/transport/test_exchange.py",),
    ),
    Fault(
        "a change is merged like a weight", "ist/transport/endpoints.py", "return before.add_(value)", "return value",
        ("tests/transport/test_exchange.py",),
    ),
    Fault(
        "a residual is sent again and again", "ist/transport/endpoints.py", "                parts[name].sub_(value)\n",
        "                pass\n", ("tests/transport/test_exchange.py",),
    ),
    # The handshake
    Fault(
        "ranks may run different configurations", "ist/distributed/process_group.py", "        if theirs != expected:\n", "        if False:\n",
        ("tests/pools/test_ranks.py",),
    ),
    Fault(
        "ranks may start at different rounds", "ist/distributed/process_group.py", "    return int(first)\n", "    return first_round\n",
        ("tests/pools/test_ranks.py", "tests/data/test_fingerprint.py"),
    ),
    Fault(
        "all configurations have the same fingerprint", "ist/config/base.py",
        "return zlib.crc32(json.dumps(tree, sort_keys=True).encode())", "return 0", ("tests/pools/test_ranks.py",),
    ),
    # Methods and their keys
    Fault(
        "a method runs on any pool", "ist/runs/open.py", "    if pool.name not in method.pools:\n", "    if False:\n",
        ("tests/baselines/test_registry.py",),
    ),
    Fault(
        "a method is made without its options", "ist/runs/opening/process.py", "functools.partial(made, **config.method_spec.options)",
        "functools.partial(made)", ("tests/baselines/test_registry.py",),
    ),
    Fault(
        "the value of an old key is lost", "ist/config/load.py", "        current = _with_value(current, new, holder[last])\n", "",
        ("tests/config/test_renamed_keys.py",),
    ),
    Fault(
        "the outer optimizer lacks Nesterov momentum", "ist/training/outer_optimizer.py", "(change + settings.momentum * momentum)",
        "momentum", ("tests/training/test_recipe.py",),
    ),
    # Arguments from Python
    Fault(
        "defaults of a section count as given", "ist/runs/arguments.py", " if key in value.model_fields_set}", "}",
        ("tests/runs/test_arguments.py",),
    ),
    Fault(
        "one of two spellings of a section is dropped", "ist/runs/arguments.py",
        "    if not isinstance(value, str | None):\n", "    if False:\n", ("tests/runs/test_arguments.py",),
    ),
    Fault(
        "a split shows the module of another worker", "ist/runs/split.py",
        "        return self.held.of(round_number)[worker]\n", "        return self.held.of(round_number)[0]\n",
        ("tests/runs/test_split.py",),
    ),
    # A user's own loop
    Fault(
        "a step that calls the base class counts twice", "ist/loops/part.py", "        if not self._open_steps:\n", "        if True:\n",
        ("tests/test_own_loop.py",),
    ),
    Fault(
        "a resumed loader draws random numbers when it starts", "ist/loops/batch_source.py",
        "with preserved_generators() if self._is_restored else nullcontext():", "with nullcontext():", ("tests/test_own_loop.py",),
    ),
    Fault(
        "a process that leaves the loop keeps its process group", "ist/own_loop.py", "        if self._has_peers:\n", "        if False:\n",
        ("tests/test_own_loop.py",),
    ),
    Fault(
        "a loader starts its first epoch again in each round", "ist/loops/batch_source.py",
        "        found = self._by_loader.get(id(loader))  # a source keeps its loader, so the id stays unique\n", "        found = None\n",
        ("tests/test_own_loop.py",),
    ),
    # Methods that IST is compared with, on real ranks
    Fault(
        "DiLoCo sums changes instead of averaging them", "ist/baselines/local_sgd.py", "            change /= size\n", "",
        ("tests/baselines/test_methods.py",),
    ),
    Fault(
        "the outer optimizer moves away from the workers", "ist/baselines/local_sgd.py",
        "(old - new).detach().flatten()", "(new - old).detach().flatten()", ("tests/baselines/test_methods.py",),
    ),
    Fault(
        "a ring all-reduce counts as one pass", "ist/baselines/gradient_hooks.py",
        "self._share = 2 * (world_size - 1) / world_size", "self._share = (world_size - 1) / world_size",
        ("tests/baselines/test_methods.py",),
    ),
    Fault(
        "compressed gradients count as uncompressed ones", "ist/baselines/gradient_hooks.py",
        "numbers = state.total_numel_after_compression - before", "numbers = buffer.numel()",
        ("tests/baselines/test_methods.py",),
    ),
    # The frozen rest
    Fault(
        "a linear layer takes the gradient of the first outputs for that of a worker's own", "ist/subnet/frozen_rest.py",
        "of_own = rows if outs is None else rows.index_select(1, outs)",
        "of_own = rows if outs is None else rows[:, : len(outs)]", ("tests/subnet/test_frozen_rest.py",),
    ),
    Fault(
        "a repeated round keeps the rest of its first attempt", "ist/transport/frozen_parameters.py",
        " if key[:1] != (_OF_A_ROUND,)}", "}", ("tests/subnet/test_frozen_rest.py",),
    ),
    Fault(
        "a changed parameter gives a wrong gradient in silence", "ist/subnet/frozen_rest.py",
        "if saved.own is not None and saved.own._version != saved.version:", "if False:", ("tests/subnet/test_frozen_rest.py",),
    ),
)  # fmt: skip
