"""Bases of latents, and what can be read off them."""

import saes.steering.figures
import saes.try_figures  # noqa: F401
from saes import code_effects as code_effects
from saes import codes as codes
from saes import figures as figures
from saes import latents as latents
from saes import pretrained as pretrained
from saes import training_run as training_run
from saes import try_on as try_on
from saes.steering import heads as heads
from saes.steering import hybrid as hybrid
from saes.steering import language_steering as language_steering
from saes.steering import layers as layers
from saes.steering import play as play
from saes.steering import program as program
from saes.steering import search as search
