"""Arguments of a run that takes seconds."""

# A small network on the real digits, a few batches per epoch.
SMALL = [
    "--config", "digits/n2uq_w2a2.yaml", "--model.backbone_args", "{width: 4}",
    "--trainer.limit_train_batches", "4", "--trainer.limit_test_batches", "1",
    "--trainer.enable_model_summary", "false",
]  # fmt: skip
EVERY_EPOCH = ["--checkpoint.filename", "{epoch}", "--checkpoint.save_top_k", "-1"]
