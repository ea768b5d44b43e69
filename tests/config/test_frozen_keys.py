"""Which keys a configuration has: a key more, less, or by another name is a decision."""

from ist.config.base import describe_keys
from ist.config.schema import Config

KEYS = """
name
seed
method
label
model.name model.args model.weights
data.name data.args data.root data.shuffle data.shard data.skew data.skew.alpha
data.collate data.loader.workers data.loader.prefetch
data.loader.pin_memory data.loader.timeout_s data.loader.start_method
train.workers train.min_workers train.epochs train.rounds train.local_steps train.batch_size train.loss train.step train.logged
train.accumulate train.autocast train.compile train.clip_grad_norm
train.optimizer.name train.optimizer.args train.optimizer.groups
train.optimizer.groups.N.match train.optimizer.groups.N.max_dims train.optimizer.groups.N.args
train.schedule train.schedule.name train.schedule.factor train.schedule.args
train.schedule_unit train.optimizer_state train.activation_scale train.running_statistics
partition.strategy partition.keep partition.rest partition.capacities partition.coverage partition.balance partition.residual
partition.exclude partition.sizes partition.blocks partition.min_depth partition.verify
recipe.stages recipe.stages.N.rounds recipe.stages.N.share recipe.stages.N.keep recipe.stages.N.rest recipe.stages.N.local_steps
recipe.stages.N.lr_scale recipe.stages.N.outer recipe.stages.N.outer.lr recipe.stages.N.outer.momentum
recipe.stages.N.merge_scale recipe.stages.N.merge_scale.own recipe.stages.N.merge_scale.shared
recipe.merge_scale.own recipe.merge_scale.shared recipe.outer.lr recipe.outer.momentum recipe.average.kind recipe.average.decay recipe.average.decay_unit recipe.average.start
exchange.down exchange.up exchange.values exchange.rest exchange.error_feedback
baseline.powersgd_rank baseline.powersgd_start baseline.outer.lr baseline.outer.momentum
evaluate.every evaluate.batch_size evaluate.metric evaluate.statistics_batches
checkpoint.every checkpoint.keep checkpoint.storage
pool.kind pool.coordinator pool.backend pool.device pool.threads pool.timeout_s pool.min_returned
pool.store pool.store_replicas pool.evaluation pool.round_attempts pool.round_deadline_s pool.allow_insecure
pool.memory_limit pool.message_buffers pool.link pool.ranks_per_worker pool.inside pool.ray.address
pool.ray.num_cpus pool.ray.num_gpus pool.ray.resources pool.ray.placement pool.ray.start_timeout_s
watch.tensorboard watch.metrics_port watch.metrics_host watch.callbacks watch.callbacks.N.name watch.callbacks.N.args
compare.methods compare.overrides
output
"""


def test_the_configuration_has_the_keys_that_it_promises() -> None:
    """A key that goes breaks files; one that is renamed is read under its old name too, with a warning."""
    found = [key for key, *_ in describe_keys(Config)]

    assert sorted(found) == sorted(KEYS.split())
