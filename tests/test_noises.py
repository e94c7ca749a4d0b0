import torch
from conftest import TinyCNN
from harness.noises import CentredLogitsTrainer, mixed_leaves, noise_of

from hf_noisekd import NoiseKDConfig
from hf_noisekd.noise.spec import parse_noise
from hf_noisekd.release.card import render_model_card
from hf_noisekd.training.losses import kl_divergence


def test_every_second_image_of_mixed_leaves_has_another_one_in_it():
    shape = (400, 1, 8, 8)
    leaves, mixed = (
        draw(torch.Generator().manual_seed(1), shape) for draw in (parse_noise("dead_leaves"), mixed_leaves)
    )
    same = (leaves == mixed).all((1, 2, 3))
    assert 0.4 < same.float().mean() < 0.6


def test_rows_are_named_by_noises_that_can_be_drawn():
    for row in ("dead_leaves|mixup:0.5", "pyramid", "dead_leaves|cutmix:0.5"):
        assert parse_noise(noise_of(row))(torch.Generator(), (2, 1, 8, 8)).isfinite().all()


def trainer(tiny_cnn, tmp_path, **options):
    shared = {"per_device_train_batch_size": 8, "input_size": [1, 8, 8], "num_calibration_images": 0}
    args = NoiseKDConfig(str(tmp_path), disable_tqdm=True, save_strategy="no", **shared | options)
    torch.manual_seed(1)  # tiny_cnn has the weights of 0
    return CentredLogitsTrainer(TinyCNN(), tiny_cnn, args)


def test_centred_logits_have_no_mean_and_are_the_limit_of_high_temperatures(tiny_cnn, tmp_path):
    loss = trainer(tiny_cnn, tmp_path).distillation_loss
    student, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(loss(student + 7, teacher - 3), loss(student, teacher))
    torch.testing.assert_close(loss(teacher + 1, teacher), torch.zeros(()))
    # Hinton et al. (2015), section 2.1: half the squared error.
    divergence = kl_divergence(student, teacher, 300.0)
    torch.testing.assert_close(divergence, loss(student, teacher) / 2, rtol=2e-2, atol=1e-4)


def test_centred_logits_teach_and_are_on_the_record(tiny_cnn, tmp_path):
    centred = trainer(tiny_cnn, tmp_path, max_steps=40, learning_rate=1e-2)
    start = centred.evaluate()["eval_batch_kl"]
    centred.train()
    assert centred.evaluate()["eval_batch_kl"] < start
    assert centred.record().noisekd.loss_type == "centered_mse"
    assert "centered_mse at temperature" in str(render_model_card(centred.record()))
