"""The schema: every key, its default and what it does. Presets import this and change a few lines.

All cadences are in steps. The defaults are those of MeanFlow's ImageNet recipe where it has one
(arXiv 2505.13447, Table 4).
"""

from ml_collections import ConfigDict

from meanflow_jax.methods import registry

# Sizes of the published transformers (arXiv 2212.09748, Table 1).
DIT = {
  "S": {"depth": 12, "width": 384, "num_heads": 6},
  "B": {"depth": 12, "width": 768, "num_heads": 12},
  "M": {"depth": 16, "width": 1024, "num_heads": 16},
  "L": {"depth": 24, "width": 1024, "num_heads": 16},
  "XL": {"depth": 28, "width": 1152, "num_heads": 16},
}


def get_config() -> ConfigDict:
  """All keys with their defaults."""
  config = ConfigDict()
  config.seed = 0  # of parameters, batches and draws

  config.data = data = ConfigDict()
  # digits | folder | tfds | latents | synthetic: which of the sections below is read
  data.source = "digits"
  data.image_size = 8  # height and width that the model sees
  data.channels = 1
  data.num_classes = 10  # 0: unconditional, labels are ignored
  data.flip = False  # mirror half of the images at random
  data.threads = 4  # that read batches; 0: read in the main thread
  data.prefetch = 8  # batches read ahead
  data.digits = ConfigDict({"split": "train"})  # train (1,500 images) | test (297) | all
  data.folder = ConfigDict()  # images below `path`, one sub-folder per class
  data.folder.path = ""
  data.folder.skip_unreadable = False  # let the next image stand in for a broken one
  data.tfds = ConfigDict()  # any image dataset of TensorFlow-datasets, prepared on disk
  data.tfds.name = "cifar10"
  data.tfds.split = "train"
  data.tfds.data_dir = ""  # "": TFDS' default
  # A folder that meanflow_jax.prepare made: latents, or pixels where autoencoder.path is empty
  data.latents = ConfigDict({"path": ""})
  data.synthetic = ConfigDict({"length": 100_000})  # noise, to time things

  # Images changed at random on the devices (arXiv 2206.00364, appendix F); the network is told how
  config.augmentation = ConfigDict()
  config.augmentation.probability = 0.0  # of scale, of anisotropy and of translation; 0: none
  config.augmentation.flip = False  # mirror half of the images, whatever data.flip did before

  config.model = model = ConfigDict()
  # dit: the keys below | in_context_dit: these and its section; it has two heads and takes guidance
  # as an input | unet: its section
  model.name = "dit"
  model.patch_size = 2
  model.update(DIT["B"])
  model.conditioning = ("t", "h")  # which of t, h = t - r and r the network is told
  model.time_frequencies = 256  # sinusoids of a time's embedding
  model.positions = "sincos"  # added to patches: none (not of dit) | sincos | learned
  model.dtype = "float32"  # of computation: float32 | bfloat16; parameters are always float32
  # auto: fused on TPUs and NVIDIA GPUs | plain: as XLA compiles it | pallas: fused, or an error
  # where it cannot run
  model.attention = "auto"
  model.scan = False  # a loop over one compiled block: quicker to compile, slower to run
  # What the backward pass recomputes: none | matmuls: all but products with weights (and
  # convolutions) | blocks: all but the input of each block
  model.remat = "matmuls"
  # DDPM++ (arXiv 2011.13456), which of the keys above reads model.dtype and model.remat
  model.unet = unet = ConfigDict()
  unet.width = 128  # channels
  unet.multipliers = (2, 2, 2)  # of them, at each level; from one to the next, sides are halved
  unet.blocks = 4  # of a level
  unet.attention_at = (16,)  # heights of the images at which blocks attend
  unet.num_heads = 1  # of the attention
  unet.time_frequencies = 256  # sinusoids of a time's embedding
  unet.dropout = 0.2  # in training

  model.in_context_dit = in_context = ConfigDict()
  in_context.head_depth = 8  # of model.depth blocks, those of one head; the others are shared
  in_context.class_tokens = 8  # that say the label
  in_context.omega_tokens = 4  # the guidance scale
  in_context.interval_tokens = 2  # each end of its interval
  in_context.time_tokens = 4  # each of the times

  config.method = method = ConfigDict()
  # The name of a file in meanflow_jax/methods: meanflow, improved_meanflow, ...
  method.name = "meanflow"
  method.times = times = ConfigDict()
  times.distribution = "logit_normal"  # logit_normal | uniform
  times.mean, times.std = -0.4, 1.0  # of logit t (logit_normal)
  times.r_mean, times.r_std = -0.4, 1.0  # of logit r (logit_normal)
  times.pairing = "sorted"  # sorted: t = max, r = min | clipped: r = min(r, t)
  times.equal_fraction = 0.75  # of rows with r = t; 1 (and clipped): flow matching
  # Fixed in training (not of improved_meanflow); effective scale: omega / (1 - kappa)
  method.guidance = guidance = ConfigDict()
  guidance.omega, guidance.kappa = 1.0, 0.0
  guidance.t_start, guidance.t_end = 0.0, 1.0  # where in t guidance is on
  guidance.from_step = 0  # of training, where guidance begins
  method.label_dropout = ConfigDict()
  method.label_dropout.rate = 0.1  # of all rows
  method.label_dropout.droppable = "equal"  # all rows, or only those with r = t ("equal")
  method.weight = ConfigDict({"p": 1.0, "c": 1e-2})  # w = 1 / (error + c)^p
  # The keys of each method's own, in a section of its name: fields with defaults, in its file
  method.update(registry.sections())

  config.optimizer = optimizer = ConfigDict()
  optimizer.learning_rate = 1e-4
  optimizer.schedule = "constant"  # constant | cosine: to 0 at train.steps
  optimizer.warmup_steps = 0
  optimizer.b1, optimizer.b2 = 0.9, 0.95  # Adam's
  optimizer.weight_decay = 0.0  # above 0: AdamW
  optimizer.clip_norm = 0.0  # bound on the gradient's norm; 0: none

  config.ema = ConfigDict()
  config.ema.decays = (0.9999,)  # one average for each
  config.ema.ramp = False  # decay = min(decay, (1 + step) / (10 + step))

  config.train = train = ConfigDict()
  train.batch_size = 256  # over all devices
  train.steps = 100_000
  train.accumulate = 1  # microbatches per step
  # Workdir (or checkpoint.path) of another run, whose newest average sample.ema a run without
  # checkpoints starts from
  train.start_from = ""
  train.log_every = 100
  train.checkpoint_every = 5_000  # 0: only at the end
  train.sample_every = 5_000  # 0: only at the end
  train.evaluate_every = 0  # 0: only at the end
  # Against loss spikes: steps whose gradient norm or unweighted error is above `factor` times its
  # rolling mean. off | record: write a diagnosis | skip: and leave out the update | roll_back: and
  # go on, with other data, from a checkpoint
  train.guard = ConfigDict({"action": "off"})
  train.guard.factor = 10.0
  train.guard.window = 100  # steps of the mean; nothing is a spike before so many
  train.guard.steps_back = 100  # by which the checkpoint of a roll-back is older, at least

  config.autoencoder = ConfigDict()  # between images and the latents that a model sees
  config.autoencoder.path = ""  # folder of Stable Diffusion's weights; "": the model sees pixels
  config.autoencoder.dtype = "float32"  # of encoding and decoding: float32 | bfloat16

  config.prepare = prepare = ConfigDict()  # python -m meanflow_jax.prepare
  prepare.records_per_shard = 10_000  # images per file
  prepare.flipped = True  # encode the mirrored images too, for data.flip
  prepare.batch_size = 64  # images at a time, over the devices of one host
  prepare.workers = 0  # processes that decode images, each with data.threads; 0: threads alone

  config.mesh = ConfigDict()  # devices = data x fsdp
  config.mesh.data = -1  # -1: all that fsdp leaves
  config.mesh.fsdp = 1  # over how many devices each parameter is spread

  config.checkpoint = ConfigDict()
  config.checkpoint.path = ""  # where they lie, local or gs://BUCKET/RUN; "": in the workdir
  config.checkpoint.keep_latest = 2
  config.checkpoint.keep_every = 0  # also keep every multiple of this; 0: no others

  config.report = ConfigDict({"wandb_project": ""})  # "": no Weights & Biases

  config.sample = sample = ConfigDict()  # --mode=sample, and the grids during training
  sample.count = 100
  sample.batch_size = 256  # per compiled call, over all devices
  sample.nfe = 1  # function evaluations
  sample.grid = ()  # times from 1 to 0; wins over nfe
  sample.labels = "balanced"  # balanced | random | one
  sample.label = 0  # the class of "one"
  sample.seed = 0  # image i depends on (seed, i) alone
  sample.ema = 0.9999  # which average of the parameters; 0: the parameters themselves
  sample.checkpoint = "newest"  # newest | best (by evaluate.best) | a step that was kept
  # From [-1, 1] to 8 bits: meanflow: floor(127.5 x + 128) | adm: floor(127.5 x + 127.5)
  sample.rounding = "meanflow"
  # Guidance when sampling, where t_min <= t <= t_max; 1 is off. An input of models of improved
  # MeanFlow; classifier-free, at two evaluations in each step, of models whose target has none
  # (flow matching, say). What method.guidance fixed in training cannot be changed
  sample.guidance = ConfigDict({"omega": 1.0, "t_min": 0.0, "t_max": 1.0})

  # --mode=evaluate, and figures during training; with the labels, seed, rounding and batch size of
  # `sample`, but not its count, nfe and grid. The table has a row for each combination of nfe, ema,
  # omega, t_min and t_max.
  config.evaluate = evaluate = ConfigDict()
  evaluate.count = 1_500  # images for each row; 0: no evaluation
  evaluate.nfe = (1, 2)  # steps of equal length
  evaluate.ema = ()  # averages of the parameters; (): sample.ema
  evaluate.omega = ()  # guidance scales when sampling; (): sample.guidance.omega
  evaluate.t_min, evaluate.t_max = (), ()  # where they start and end; (): those of sample.guidance
  evaluate.extractors = ("pixels",)  # some of pixels | inception | dinov2: the sections below
  # Some of frechet | kid | precision_recall, and with inception sfid | inception_score
  evaluate.figures = ("frechet",)
  evaluate.best = ""  # keep the checkpoint best by this figure, e.g. "fid_nfe1"; "": none
  # Files of the real images' statistics (python -m meanflow_jax.prepare --statistics, or published
  # ones) by extractor; "": made of the images of `data`
  evaluate.statistics = ConfigDict({"pixels": "", "inception": "", "dinov2": ""})
  evaluate.pixels = ConfigDict({"resolution": 16})  # larger images are averaged down to this
  evaluate.inception = ConfigDict()  # FID's InceptionV3
  evaluate.inception.weights = "weights/inception-2015-12-05.safetensors"
  evaluate.inception.inputs = "meanflow"  # pytorch | tensorflow | meanflow: resize and scaling
  evaluate.inception.logits_bias = False  # in the inception score; ADM and MeanFlow: without
  evaluate.dinov2 = ConfigDict()  # FD-DINOv2
  evaluate.dinov2.weights = "weights/dinov2-large"
  evaluate.dinov2.dtype = "float32"  # of computation: float32 | bfloat16
  return config.lock()
