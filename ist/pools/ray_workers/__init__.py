"""The Ray actors that run workers: started, watched and replaced by the driver."""
