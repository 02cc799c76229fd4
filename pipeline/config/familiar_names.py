"""Names that other tools have for what a job file says, for messages about unknown names.

Users come from the Trainer of transformers, timm, Lightning, AutoGluon, Ludwig or scikit-learn.
"""

from __future__ import annotations

SAME_THING: dict[str, tuple[str, ...]] = {
    # fields of a job
    **dict.fromkeys(("model", "models", "encoder", "model_name_or_path"), ("backbone",)),
    **dict.fromkeys(("model_name", "architecture", "network"), ("backbone",)),
    **dict.fromkeys(("task", "loss", "problem_type"), ("objective",)),
    **dict.fromkeys(("pretrained", "checkpoint", "weights"), ("init",)),
    **dict.fromkeys(("dataset", "datasets", "dataset_name"), ("data",)),
    **dict.fromkeys(("path", "file", "files", "data_dir", "data_files"), ("uri",)),
    **dict.fromkeys(("train_file", "train_path", "train_data"), ("train",)),
    **dict.fromkeys(("val", "valid", "dev", "eval", "validation_file"), ("validation",)),
    **dict.fromkeys(("test_file", "test_path", "test_data"), ("test",)),
    **dict.fromkeys(("val_split", "validation_split", "val_size"), ("validation_fraction",)),
    **dict.fromkeys(("test_size", "test_split"), ("test_fraction",)),
    **dict.fromkeys(("group_column", "groups", "patient"), ("group",)),
    "speaker": ("group", "identity"),
    **dict.fromkeys(("output_dir", "save_dir", "log_dir", "default_root_dir"), ("storage",)),
    **dict.fromkeys(("metrics", "eval_metric", "metric_for_best_model"), ("metric",)),
    **dict.fromkeys(("method", "methods"), ("techniques", "technique")),
    **dict.fromkeys(("peft", "adapter"), ("techniques", "technique", "lora", "bottleneck")),
    **dict.fromkeys(("text_column", "label_column", "target_column"), ("columns",)),
    **dict.fromkeys(("split", "splits"), ("split_column", "test_fraction")),
    **dict.fromkeys(("limit", "max_samples", "max_train_samples"), ("label_fractions",)),
    **dict.fromkeys(("report_to", "logger", "loggers"), ("tracking",)),
    **dict.fromkeys(("n_trials", "num_trials", "num_samples"), ("trials",)),
    **dict.fromkeys(("param_space", "search_space", "hyperparameters"), ("search",)),
    **dict.fromkeys(("num_seeds", "n_seeds", "repeats"), ("seeds",)),
    **dict.fromkeys(("random_state", "random_seed", "manual_seed"), ("seed",)),
    **dict.fromkeys(("cv", "n_splits", "k_folds", "num_folds", "num_bag_folds"), ("folds",)),
    # fields of train
    **dict.fromkeys(("batch_size", "batch", "per_device_train_batch_size"), ("global_batch",)),
    **dict.fromkeys(("train_batch_size", "per_gpu_train_batch_size"), ("global_batch",)),
    **dict.fromkeys(("learning_rate", "base_lr", "max_lr", "lr_max"), ("lr",)),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "max_epochs", "n_epochs"), ("epochs",)),
    **dict.fromkeys(("max_steps", "num_steps", "total_steps", "iterations"), ("steps",)),
    **dict.fromkeys(("warmup_ratio", "warmup_steps", "warmup_epochs"), ("warmup",)),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "sched"), ("schedule",)),
    "scheduler": ("schedule",),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches"), ("micro_batch",)),
    **dict.fromkeys(("max_grad_norm", "gradient_clip_val", "clip_grad"), ("clip_norm",)),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed_precision"), ("precision",)),
    **dict.fromkeys(("eval_steps", "eval_strategy", "evaluation_strategy"), ("eval_every_steps",)),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), ("eval_every_steps",)),
    **dict.fromkeys(("save_steps", "save_strategy"), ("checkpoint_every_steps",)),
    **dict.fromkeys(("logging_steps", "log_interval"), ("log_every_steps",)),
    **dict.fromkeys(("optim", "opt"), ("optimizer",)),
    **dict.fromkeys(("early_stopping_patience", "early_stopping", "early_stop"), ("patience",)),
    "load_best_model_at_end": ("keep",),
    **dict.fromkeys(("model_ema", "ema_decay"), ("ema",)),
    # options
    **dict.fromkeys(("image_size", "img_size", "input_size", "resolution"), ("size",)),
    **dict.fromkeys(("in_chans", "num_channels", "in_channels"), ("channels",)),
    **dict.fromkeys(("max_length", "max_seq_length", "max_len", "block_size"), ("length",)),
    "vocab_size": ("vocabulary",),
    **dict.fromkeys(("sampling_rate", "sample_rate", "sr"), ("rate",)),
    **dict.fromkeys(("n_mels", "num_mel_bins"), ("mels",)),
    "label_smoothing_factor": ("label_smoothing",),
    "class_weights": ("class_weight",),
    "mlm_probability": ("mask_share",),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "depth"), ("layers",)),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim"), ("hidden",)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), ("heads",)),
    "drop_path_rate": ("drop_path",),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), ("rank",)),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "target_modules": ("modules",),
    # modalities
    **dict.fromkeys(("images", "vision", "picture", "pictures"), ("image",)),
    **dict.fromkeys(("sound", "wav", "waveform"), ("audio",)),
    **dict.fromkeys(("nlp", "language", "texts"), ("text",)),
    **dict.fromkeys(("tabular", "structured"), ("table",)),
    **dict.fromkeys(("time_series", "timeseries"), ("series", "events")),
    **dict.fromkeys(("sensors", "ecg", "eeg", "accelerometer"), ("series",)),
    "ehr": ("events",),
    **dict.fromkeys(("robot", "robotics", "episodes"), ("trajectory",)),
    # objectives
    **dict.fromkeys(("image_classification", "text_classification"), ("classification",)),
    **dict.fromkeys(("sequence_classification", "audio_classification"), ("classification",)),
    **dict.fromkeys(("tabular_classification", "binary", "sentiment"), ("classification",)),
    **dict.fromkeys(("multiclass", "multi_class", "softmax"), ("classification",)),
    **dict.fromkeys(("multi_label", "multi_label_classification", "bce"), ("multilabel",)),
    **dict.fromkeys(("regressor", "tabular_regression", "mse_loss"), ("regression",)),
    **dict.fromkeys(("speaker_verification", "face_verification"), ("verification",)),
    **dict.fromkeys(("arcface", "aam_softmax", "speaker_recognition"), ("verification",)),
    **dict.fromkeys(("ner", "token_classification", "pos_tagging"), ("tagging",)),
    **dict.fromkeys(("question_answering", "extractive_qa"), ("qa",)),
    "object_detection": ("detection",),
    **dict.fromkeys(("mask_rcnn", "maskrcnn"), ("instance_segmentation",)),
    **dict.fromkeys(("semantic_segmentation", "image_segmentation"), ("segmentation",)),
    **dict.fromkeys(("asr", "speech_recognition", "automatic_speech_recognition"), ("ctc",)),
    "speech": ("audio", "ctc"),
    **dict.fromkeys(("fill_mask", "masked_lm", "masked_language_modeling"), ("mlm",)),
    **dict.fromkeys(("causal_lm", "text_generation", "next_token"), ("clm",)),
    **dict.fromkeys(("lm", "language_modeling", "language_model"), ("clm", "mlm")),
    **dict.fromkeys(("ssl", "self_supervised"), ("simclr", "dino", "mae")),
    "contrastive": ("simclr", "clip"),
    **dict.fromkeys(("image_text", "siglip", "align", "clap"), ("clip",)),
    **dict.fromkeys(("imitation", "imitation_learning", "bc"), ("behaviour_cloning",)),
    "cross_entropy": ("classification", "loss"),
    # metrics
    **dict.fromkeys(("acc", "top1", "top_1"), ("accuracy",)),
    **dict.fromkeys(("top5", "top_5"), ("top5_accuracy",)),
    **dict.fromkeys(("f1", "f1_score", "f1_macro"), ("macro_f1", "entity_f1", "answer_f1")),
    "f1_micro": ("micro_f1",),
    **dict.fromkeys(("overall_f1", "seqeval"), ("entity_f1",)),
    **dict.fromkeys(("auc", "roc_auc", "roc_auc_score"), ("auroc", "macro_auroc")),
    **dict.fromkeys(("ap", "pr_auc", "average_precision"), ("auprc", "macro_average_precision")),
    **dict.fromkeys(("iou", "mean_iou", "jaccard", "dice"), ("miou",)),
    **dict.fromkeys(("map_50", "ap50"), ("map50",)),
    **dict.fromkeys(("mask_ap", "segm_map", "ap_mask"), ("mask_map",)),
    **dict.fromkeys(("em", "exact"), ("exact_match",)),
    **dict.fromkeys(("mean_squared_error", "mse", "root_mean_squared_error"), ("rmse",)),
    **dict.fromkeys(("mean_absolute_error", "l1"), ("mae",)),
    **dict.fromkeys(("r2_score", "explained_variance"), ("r2",)),
    **dict.fromkeys(("spearmanr", "rank_correlation"), ("spearman",)),
    "word_error_rate": ("wer",),
    "equal_error_rate": ("eer",),
    "mindcf": ("min_dcf",),
    **dict.fromkeys(("character_error_rate", "char_error_rate"), ("cer",)),
    "ppl": ("perplexity",),
    **dict.fromkeys(("cohen_kappa", "quadratic_kappa", "qwk"), ("kappa",)),
    **dict.fromkeys(("log_loss", "nll", "eval_loss"), ("loss",)),
    # techniques and baselines
    **dict.fromkeys(("finetune", "fine_tune", "finetuning", "fine_tuning"), ("full",)),
    **dict.fromkeys(("full_finetune", "full_finetuning", "full_fine_tuning"), ("full",)),
    **dict.fromkeys(("feature_extraction", "frozen", "linear", "probe"), ("linear_probe",)),
    **dict.fromkeys(("freeze", "freeze_backbone", "head"), ("linear_probe",)),
    "logistic_regression": ("linear_probe", "bag_of_words", "log_mel_statistics"),
    **dict.fromkeys(("adapters", "houlsby"), ("bottleneck", "lora")),
    "qlora": ("lora",),
    **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning"), ("lora", "bottleneck")),
    **dict.fromkeys(("random", "random_init", "no_pretraining", "from_scratch"), ("scratch",)),
    "stochastic_weight_averaging": ("swa",),
    **dict.fromkeys(("self_training", "pseudo_label"), ("pseudo_labels",)),
    **dict.fromkeys(("xgboost", "lightgbm", "catboost", "gbm"), ("boosted_trees",)),
    "random_forest": ("boosted_trees",),
    **dict.fromkeys(("knn", "nearest_neighbours"), ("nearest_pixels", "nearest_steps")),
    **dict.fromkeys(("tfidf", "tf_idf"), ("bag_of_words",)),
    **dict.fromkeys(("dummy", "most_frequent"), ("majority",)),
    **dict.fromkeys(("knn_policy", "vinn"), ("nearest_steps",)),
    # roles of columns
    **dict.fromkeys(("target", "targets", "y"), ("label", "labels", "tags", "value", "columns")),
    **dict.fromkeys(("class", "category"), ("label", "labels", "tags")),
    **dict.fromkeys(("label", "number", "score"), ("value", "columns")),
    **dict.fromkeys(("person", "speaker_id", "person_id"), ("identity",)),
    "ner_tags": ("tags",),
    **dict.fromkeys(("sentence", "review", "document", "content"), ("text", "transcript")),
    "question": ("text",),
    **dict.fromkeys(("context", "sentence2", "hypothesis"), ("text_pair",)),
    **dict.fromkeys(("filename", "file_name", "filepath", "file_path"), ("image", "audio")),
    **dict.fromkeys(("img", "image_path", "pixel_values"), ("image",)),
    **dict.fromkeys(("speech_path", "audio_path", "recording"), ("audio",)),
    **dict.fromkeys(("x", "input", "inputs"), ("image", "text", "audio", "features")),
    "transcription": ("transcript",),
    **dict.fromkeys(("bbox", "bboxes"), ("boxes",)),
    **dict.fromkeys(("action", "command"), ("actions",)),
    **dict.fromkeys(("observation", "obs", "state", "states"), ("observations",)),
}
"""Names of the field, in lower case with underscores, and what may be meant by them here."""

DIFFERENCES: dict[str, str] = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulate_grad_batches"),
        "micro_batch is the number of rows of a pass, not of passes",
    ),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_gpu_train_batch_size"),
        "global_batch is the number of rows of a step over all devices",
    ),
    **dict.fromkeys(
        ("warmup_steps", "warmup_epochs"), "warmup is a share of the steps, such as 0.1"
    ),
    **dict.fromkeys(
        ("label", "target", "label_column", "text_column", "target_column"),
        "columns: {text: NAME, label: NAME}",
    ),
    "qlora": "with quantize: {lora: {quantize: nf4}}",
}
"""A remark behind the name: how the value differs from the other tool's, or how it is written."""

NOT_NEEDED: dict[str, str] = {
    **dict.fromkeys(
        ("num_labels", "num_classes", "n_classes"),
        "classes are found in the training rows: leave it out",
    ),
    **dict.fromkeys(
        ("id2label", "label2id", "label_names", "class_names"),
        "names of classes are the labels themselves, or the column of role label_name: leave it "
        "out",
    ),
    **dict.fromkeys(
        ("num_workers", "dataloader_num_workers", "num_proc"),
        "rows are decoded by as many processes as there are cores: leave it out (workers are the "
        "DDP ranks)",
    ),
    **dict.fromkeys(
        ("device", "devices", "accelerator", "gpus", "cuda"),
        "a GPU is used where there is one: leave it out (gpus_per_worker and "
        "fanout.gpus_per_trial set shares)",
    ),
    **dict.fromkeys(
        ("delimiter", "sep", "separator"),
        ".csv has commas and .tsv tabs; onetomany prepare csv reads others: leave it out",
    ),
    **dict.fromkeys(
        ("time_limit", "max_time"),
        "train.steps or train.epochs limits a training, fanout.select.budget the number of trials: "
        "leave it out",
    ),
    **dict.fromkeys(
        ("presets", "preset", "quality"),
        "sources, techniques and train say what is tried: leave it out",
    ),
    "head": "the head belongs to the objective: leave it out",
    "stratify": "splits are drawn by chance, label fractions by class: leave it out",
    "header": "the first line of a CSV file has the names of its columns: leave it out",
    **dict.fromkeys(
        ("remove_unused_columns", "drop_last", "pin_memory", "push_to_hub"),
        "there is no such choice here: leave it out",
    ),
}
"""Fields of other tools that nothing here stands for, and why."""

UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        ("summarization", "translation", "seq2seq", "text2text_generation", "image_captioning"),
        "no objective generates a text from an input; clm continues texts",
    ),
    **dict.fromkeys(
        ("bleu", "sacrebleu", "rouge", "rouge1", "rouge2", "rougel", "meteor", "bertscore", "chrf"),
        "no metric compares written texts; clm and mlm have perplexity and bits_per_byte, qa has "
        "answer_f1 and exact_match",
    ),
}
"""Objectives and metrics of other tools that do not exist here, with the nearest ones."""

OPTIONS = {
    **dict.fromkeys(("--label", "--target", "--label-column", "--target-col"), "--target-column"),
    **dict.fromkeys(("--task", "--problem-type"), "--objective"),
    **dict.fromkeys(("--model", "--checkpoint", "--backbone", "--pretrained"), "--source"),
    **dict.fromkeys(("--out", "--output-dir", "--output_dir"), "--output"),
    **dict.fromkeys(("--override", "--overrides"), "--set"),
}
"""Options of commands of other tools, and what is meant by them here."""

COMMANDS = {
    **dict.fromkeys(("train", "fit", "tune", "experiment"), "run"),
    **dict.fromkeys(("evaluate", "eval", "test", "results", "leaderboard"), "report"),
    **dict.fromkeys(("infer", "inference", "transcribe", "classify"), "predict"),
    **dict.fromkeys(("encode", "features"), "embed"),
    **dict.fromkeys(("new", "create", "start"), "init"),
    **dict.fromkeys(("list", "models"), "backbones"),
}
"""Commands of other tools, and what does the same here."""


def same_thing(name: str) -> tuple[str, ...]:
    """Return what may be meant here by a name of other tools."""
    return SAME_THING.get(_plain(name), ())


def difference(name: str) -> str:
    """Return how the value differs from that of other tools, or an empty string."""
    return DIFFERENCES.get(_plain(name), "")


def why_not_needed(name: str) -> str:
    """Return why a field of other tools is left out here, or an empty string."""
    return NOT_NEEDED.get(_plain(name), "")


def why_unsupported(name: str) -> str:
    """Return that an objective or metric does not exist here and what is nearest, or ""."""
    return UNSUPPORTED.get(_plain(name), "")


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")
