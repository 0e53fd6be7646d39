"""Options that have, or had, another name: in transformers and TRL, or here."""

# our former names of flags, which still work
FORMER = {"eval_samples": "--problems", "limit": "--problems"}
# flags of `run` → those of `eval`
OF_EVAL = {
    "eval_temperature": "--temperature",
    "eval_top_p": "--top-p",
    "eval_top_k": "--top-k",
    "eval_sampling": "--sampling",
}
# further flags of `run` for which `eval` has another name; they are suggested, not translated
NEAR_IN_EVAL = {"student": "--model", "student_thinking": "--thinking"}
# options of one command alone → the command
ONLY_OF = {
    **dict.fromkeys(("dry_run", "resume"), "run"),
    **dict.fromkeys(
        ("card", "device_tflops", "from_run", "measure", "prefixes", "prompt_tokens"), "plan"
    ),
    **dict.fromkeys(("model", "sampling", "thinking"), "eval"),
    **dict.fromkeys(("reference", "title"), "report"),
    **dict.fromkeys(("gguf", "which"), "export"),
    **dict.fromkeys(("kl", "limit", "live", "step", "wrong"), "show"),
}

# names of transformers and TRL
RENAMED = {
    "output_dir": "--out",
    "model_name_or_path": "--student",
    "teacher_model_name_or_path": "--teacher",
    "dataset_name": "--dataset",
    "dataset_train_split": "--split",
    "dataset_test_split": "--eval-split",
    "learning_rate": "--lr",
    "max_steps": "--steps",
    "max_grad_norm": "--grad-clip",
    "max_completion_length": "--max-new-tokens",
    "max_prompt_length": "--max-prompt-tokens",
    "num_generations": "--samples",
    "eval_steps": "--eval-every",
    "save_steps": "--save-every",
    "save_total_limit": "--keep-checkpoints",
    "ddp_timeout": "--rank-timeout",
    "torch_dtype": "--dtype",
    "lora_r": "--lora",
    "lora_target_modules": "--lora-targets",
}
