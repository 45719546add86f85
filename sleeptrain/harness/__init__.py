"""A checkpoint under lm-eval, EleutherAI's harness of benchmarks: ``python -m sleeptrain.harness``."""
