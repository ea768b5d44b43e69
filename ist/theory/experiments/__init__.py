"""The experiments, a module each; see `ist.theory.experiment.Experiment`."""
