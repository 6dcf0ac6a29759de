"""The callbacks that come with gptfast: the progress bar, samples, records, TensorBoard, wandb."""
