"""Sampling images that fit a measurement: one file per method, one signature.

    image, info = method(key, denoiser, measurement, operator, initial, config, indices=None)

key          Consumed.
denoiser     The prior: a `diffusion.denoiser.Denoiser`, which takes batches.
measurement  y [batch ...].
operator     A, from one image to one measurement: any differentiable function, unless the method says otherwise.
initial      Gives the shape of the images. Where a method starts from noise, zeros begin in pure noise, and anything
             else is noised to the first time of the chain.
config       The method and its settings.
indices      Numbers of the samples, which name their random numbers; 0 to batch - 1 when absent.
image        [batch ...]; no sample depends on its batch mates.
info         `frame.Info`, one row per step, the first step first.
"""
