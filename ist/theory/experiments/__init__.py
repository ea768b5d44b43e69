"""The experiments, one module each, with the interface `ist.theory.experiment.Experiment`."""
