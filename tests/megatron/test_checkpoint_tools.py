"""The checkpoint tools: their errors, and the output of compare, inspect and reshard."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import corruptions
import megatron_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion import make_folder

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.checkpoint.compare_tensors import compare_stored, logits, logits_difference
from spark_nemo.megatron.checkpoint.reader import open_checkpoint
from spark_nemo.megatron.checkpoint.torch_dist_reader import StoredCheckpoint
from spark_nemo.megatron.worker import MegatronWorker

LAYOUT = MegatronConfig(dtype="bfloat16", distributed_optimizer=True)


TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.append(str(TOOLS))  # as Python does for a script that is started there


def run(tool, *arguments):
    spec = importlib.util.spec_from_file_location(tool, TOOLS / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(x) for x in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder, made a Megatron and a NeMo folder by the command line."""
    root = tmp_path_factory.mktemp("tools")
    hf = make_folder(root / "hf", "qwen3")
    assert run("convert_hf_to_megatron", hf, root / "megatron") == 0
    assert run("convert_hf_to_megatron", hf, root / "nemo", "--to", "nemo") == 0
    return root


@pytest.fixture(scope="module")
def training(tmp_path_factory, model):
    """A run's folder of checkpoints after one step, and the worker."""
    folder = tmp_path_factory.mktemp("run")
    worker = MegatronWorker.from_hf(
        model / "hf", LAYOUT, seed=0, optimizer=cases.ADAM, total_steps=6
    )
    worker.train_step([cases.pack(cases.make_sequences())], cases.loss_fn)
    worker.save_checkpoint(folder / "run", {"epoch": 3})
    return folder / "run"


def test_all_formats_compare_equal(model, tmp_path, capsys):
    """Hugging Face, Megatron and NeMo folders of one model have the same bits; a change of one
    value is found, named and measured, and so are missing tensors.
    """
    assert run("convert_megatron_to_hf", model / "nemo", tmp_path / "hf") == 0
    for other in (model / "megatron", model / "nemo", tmp_path / "hf"):
        capsys.readouterr()
        assert run("compare_checkpoints", model / "hf", other) == 0
        assert "0 not the same" in capsys.readouterr().out
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert run("compare_checkpoints", tmp_path / "hf", model / "megatron") == 1
    assert "model.norm.weight: differs, max 0.5" in capsys.readouterr().out
    assert run("compare_checkpoints", tmp_path / "hf", model / "megatron", "--tolerance", 0.5) == 0
    assert run("compare_checkpoints", tmp_path / "none", model / "megatron") == 2
    assert "does not exist" in capsys.readouterr().err


def test_logits_tell_models_apart(model, tmp_path):
    """Logits of a Megatron folder are transformers' own on the Hugging Face folder; other weights
    give others.
    """
    write_tokenizer(tmp_path)
    hf, megatron = open_checkpoint(model / "hf"), open_checkpoint(model / "megatron")
    assert logits_difference(hf, megatron, "a b a c", tmp_path) == 0
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model / "hf", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert float((logits(megatron, ids) - reference(ids).logits[0]).abs().max()) <= 1e-4
    other = open_checkpoint(make_folder(tmp_path / "other", "qwen3", initializer_range=0.2))
    assert logits_difference(hf, other, "a b", tmp_path) > 0.01
    path = next((tmp_path / "other").glob("*.safetensors"))
    save_file(
        {name: torch.full_like(x, torch.nan) for name, x in load_file(path).items()},
        path,
        {"format": "pt"},
    )
    assert logits_difference(hf, open_checkpoint(tmp_path / "other"), "a b", tmp_path) == math.inf


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def test_inspection_reads_no_tensor(model, training, tmp_path, capsys):
    """Step, layout, sizes and shapes are there also when every file with values is gone but in
    name.
    """
    for name in ("hf", "megatron", "nemo"):
        assert run("inspect_checkpoint", model / name) == 0
    out = capsys.readouterr().out
    assert "model.norm.weight  [64]  bfloat16  128 B" in out
    assert "module.decoder.layers.mlp.linear_fc1.weight  [2, 192, 64]  bfloat16" in out
    corruptions.shutil.copytree(training, tmp_path / "run")
    for path in (tmp_path / "run").rglob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    assert run("inspect_checkpoint", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "step: 1\n" in out and "distrib_optim_sharding_type=fully_reshardable" in out
    assert "optimizer.state.exp_avg.decoder.final_layernorm.weight  [64]  float32  256 B" in out


def test_resharding_keeps_every_bit(training, model, tmp_path, capsys):
    """Rewritten for TP4 x PP2, weights and optimizer states are the same bits in smaller boxes, and
    resuming from there gives the same next step. A layout that the model does not allow is named.
    """
    assert (
        run(
            "reshard_checkpoint",
            training,
            tmp_path / "run",
            "--tensor-parallel",
            4,
            "--pipeline-parallel",
            2,
        )
        == 0
    )
    one, two = (
        StoredCheckpoint(folder / "step-00000001") for folder in (training, tmp_path / "run")
    )
    assert {x.found for x in compare_stored(one, two)} == {"same"}
    assert (
        len(two.tensors["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"].chunks)
        == 2 * 8
    )
    assert run("compare_checkpoints", training, tmp_path / "run", "--with-optimizer") == 0
    steps = []
    for folder in (training, tmp_path / "run"):
        worker = MegatronWorker.from_hf(
            model / "hf", LAYOUT, seed=1, optimizer=cases.ADAM, total_steps=6
        )
        assert worker.load_checkpoint(folder) == {"epoch": 3} and worker.step == 1
        steps.append(
            [
                worker.train_step([cases.pack(cases.make_sequences(n))], cases.loss_fn)
                for n in (1, 2)
            ]
        )
    assert steps[0] == steps[1]
    assert run("reshard_checkpoint", training, tmp_path / "other", "--tensor-parallel", 3) == 2
    assert "megatron.tensor_parallel=3 does not divide" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_optimizer_that_only_its_layout_can_read(training, tmp_path, capsys):
    """dp_reshardable is an error with the fix; a lost optimizer state is named."""
    step = tmp_path / "run" / "step-00000001"
    corruptions.shutil.copytree(training, tmp_path / "run")
    key = "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"
    original = (step / ".metadata").read_bytes()
    corruptions.edit_metadata(lambda metadata: metadata.state_dict_metadata.pop(key), step)
    assert run("reshard_checkpoint", tmp_path / "run", tmp_path / "out") == 2
    assert f"lacks tensor {key}" in capsys.readouterr().err
    (step / ".metadata").write_bytes(original)
    common = torch.load(step / "common.pt", weights_only=True)
    common["content_metadata"]["distrib_optim_sharding_type"] = "dp_reshardable"
    torch.save(common, step / "common.pt")
    assert run("reshard_checkpoint", tmp_path / "run", tmp_path / "out") == 2
    assert "dp_reshardable: only the tensor and pipeline layout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tool",
    [
        "convert_hf_to_megatron",
        "convert_megatron_to_hf",
        "reshard_checkpoint",
        "compare_checkpoints",
        "inspect_checkpoint",
    ],
)
def test_help_shows_an_example(tool, capsys):
    """--help has a command that can be copied, and the user guide has every tool."""
    with pytest.raises(SystemExit):
        run(tool, "--help")
    assert f"python tools/{tool}.py " in capsys.readouterr().out
    assert (
        f"tools/{tool}.py"
        in (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()
    )


def test_existing_output_is_not_touched(model, tmp_path, capsys):
    """An existing folder is an error, and stays as it is; so is one inside the source."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert run("convert_hf_to_megatron", model / "hf", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    assert run("convert_hf_to_megatron", model / "hf", model / "hf" / "out") == 2
    assert json.loads((model / "hf" / "config.json").read_text())["model_type"] == "qwen3"


def copy_of(model, folder, **settings):
    """A copy of the Hugging Face folder, with other settings in its config.json."""
    corruptions.shutil.copytree(model / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def test_settings_are_rejected_or_read_as_transformers_does(model, tmp_path, capsys):
    """Null settings, also dtype next to torch_dtype, count as missing. An unknown type, and a
    long quantization_config, are one short line and no output.
    """
    folder = copy_of(
        model,
        tmp_path / "hf",
        dtype=None,
        torch_dtype="bfloat16",
        rms_norm_eps=None,
        initializer_range=None,
    )
    assert run("convert_hf_to_megatron", folder, tmp_path / "out") == 0
    assert open_checkpoint(folder).spec.norm_eps == 1e-6
    for number, (settings, message) in enumerate(
        (
            ({"dtype": None, "torch_dtype": "float32"}, "config.json says torch.float32"),
            ({"dtype": ["bfloat16"]}, "dtype=['bfloat16'] is not one of"),
            (
                {"quantization_config": {"quant_method": "fp8", "modules": ["x"] * 99}},
                "quant_method='fp8' is not",
            ),
        )
    ):
        wrong = copy_of(model, tmp_path / f"wrong{number}", **settings)
        assert run("convert_hf_to_megatron", wrong, tmp_path / "none") == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in err and len(err) < 200 + len(str(wrong))
    assert not (tmp_path / "none").exists() and not (tmp_path / ".none.partial").exists()


def make_strange_folders(root, model):
    """Folders that people name: (folder, what the message must say)."""
    (root / "cache" / "snapshots" / "abc").mkdir(parents=True)
    (root / "lora").mkdir()
    (root / "lora" / "adapter_config.json").write_text("{}")
    (root / "legacy" / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    (root / "legacy" / "latest_checkpointed_iteration.txt").write_text("10")
    (root / "slime" / "iter_0000010").mkdir(parents=True)
    (root / "actor" / "dist_ckpt").mkdir(parents=True)
    (root / "bytes").mkdir()
    (root / "bytes" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff")
    (root / "empty").mkdir()
    (root / "pickles").mkdir()
    return [
        ("Qwen/Qwen2.5-7B", "hf download"),
        (model / "hf" / "config.json", "is a file"),
        (root / "cache", "snapshots/abc"),
        (root / "lora", "merge"),
        (root / "legacy", "torch_dist"),
        (root / "slime", "iter_0000010"),
        (root / "actor", "dist_ckpt"),
        (root / "bytes", "not a folder"),
        (root / "empty", "neither config.json"),
        (root / "none", "does not exist"),
    ]


@pytest.mark.parametrize("tool", ["convert_megatron_to_hf", "inspect_checkpoint"])
def test_folders_of_other_kinds_are_told_apart(model, tmp_path, capsys, tool):
    """A hub name, a file, the top of a Hugging Face cache, an adapter, Megatron-LM's older format
    and folders one level too high are errors that name the folder to use instead. Their
    content is not read.
    """
    (tmp_path / "in").mkdir()
    for folder, message in make_strange_folders(tmp_path / "in", model):
        assert run(tool, folder, *([tmp_path / "out"] if "convert" in tool else [])) == 2, folder
        out = capsys.readouterr()
        assert message in out.err and len(out.err.splitlines()) == 1 and out.out == "", folder
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("step_is_there", [True, False])
def test_a_trainer_s_folder_with_deepspeed_s_files_is_a_model(model, tmp_path, step_is_there):
    """DeepSpeed leaves a file "latest", as our runs do, and a folder of its own next to the model
    that it saved; that folder is often deleted. The tools read the model.
    """
    folder = copy_of(model, tmp_path / "checkpoint-100")
    (folder / "latest").write_text("global_step100")
    if step_is_there:
        (folder / "global_step100").mkdir()
        (folder / "global_step100" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    assert run("inspect_checkpoint", folder) == 0
    assert run("compare_checkpoints", folder, model / "megatron") == 0


def test_files_that_git_lfs_has_not_fetched_are_named(model, tmp_path, capsys):
    """A clone without git-lfs has pointers instead of weights and tokenizer; a missing shard says
    so, too.
    """
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4902257696\n"
    )
    folder = copy_of(model, tmp_path / "hf")
    shard = sorted(folder.glob("*.safetensors"))[1]
    for path in (shard, folder / "tokenizer.json"):
        kept = path.read_bytes()
        path.write_text(pointer)
        assert run("convert_hf_to_megatron", folder, tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert f"{path} is a Git LFS pointer" in err and "git lfs pull" in err
        path.write_bytes(kept)
    shard.unlink()
    assert run("convert_hf_to_megatron", folder, tmp_path / "out") == 2
    assert f"{shard} is missing" in capsys.readouterr().err


def test_inspection_shows_what_cannot_be_converted(model, tmp_path, capsys):
    """FP8 tensors and their scales are listed with their type, though a conversion rejects them."""
    folder = copy_of(model, tmp_path / "hf")
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("proj.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    assert run("inspect_checkpoint", folder) == 0
    assert f"{name}  {list(tensors[name].shape)}  float8_e4m3fn" in capsys.readouterr().out
    assert run("convert_hf_to_megatron", folder, tmp_path / "out") == 2
    assert f"tensor {name} in" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_the_command_resumes(model, tmp_path, capsys):
    """When a file cannot be written to its end, torch raises an error of its archive, not of the
    disk. A limit on file sizes simulates the full disk. The message is the system's, and the same
    command finishes.
    """
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (4096, 20_000, 30_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            status = run("convert_hf_to_megatron", model / "hf", tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 2 and "File too large" in capsys.readouterr().err
    assert run("convert_hf_to_megatron", model / "hf", tmp_path / "out") == 0
    assert run("compare_checkpoints", model / "hf", tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_is_one_line(monkeypatch, model, tmp_path, capsys):
    """Ctrl-C ends a tool with 130 and one line."""
    from spark_nemo.megatron.hf_files import SafetensorsFolder

    def interrupted(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsFolder, "__getitem__", interrupted)
    assert run("convert_hf_to_megatron", model / "hf", tmp_path / "out") == 130
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("interrupted")


def test_options_without_effect_and_wrong_numbers_are_refused(model, tmp_path, capsys):
    """An option that would be ignored, and a number that is none, stop a tool before it writes."""
    hf, megatron, out = model / "hf", model / "megatron", tmp_path / "out"
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    for message, tool, *arguments in (
        (
            "--max-shard-gb",
            "convert_megatron_to_hf",
            megatron,
            out,
            "--to",
            "megatron",
            "--max-shard-gb",
            1,
        ),
        ("--hf-config", "convert_megatron_to_hf", hf, out, "--hf-config", hf),
        (
            "--text",
            "compare_checkpoints",
            megatron,
            megatron,
            "--with-optimizer",
            "--text",
            tmp_path / "text",
        ),
        ("text", "compare_checkpoints", hf, megatron, "--text", tmp_path / "text"),
        ("inside", "reshard_checkpoint", megatron, megatron / "out"),
    ):
        assert run(tool, *arguments) == 2
        out_err = capsys.readouterr()
        assert message in out_err.err and out_err.out == "" and len(out_err.err.splitlines()) == 1
    for tool, option, values in (
        ("convert_megatron_to_hf", "--max-shard-gb", ("0", "-1", "nan", "inf")),
        ("compare_checkpoints", "--tolerance", ("-1", "nan", "x")),
    ):
        for value in values:
            with pytest.raises(SystemExit) as caught:
                run(tool, megatron, out, f"{option}={value}")
            assert caught.value.code == 2 and option in capsys.readouterr().err
    assert not out.exists() and not (megatron / "out").exists()


def test_tensors_are_compared_whatever_config_json_says(model, tmp_path, capsys):
    """compare reads the stored tensors, whatever dtype config.json states."""
    folder = copy_of(model, tmp_path / "hf", dtype="float32")
    assert run("compare_checkpoints", folder, model / "megatron") == 0
    assert "0 not the same" in capsys.readouterr().out


def test_home_and_odd_paths(model, tmp_path, monkeypatch, capsys):
    """~ that the shell has left, spaces, relative paths and links to folders work; an output that
    is a dangling link is an error before anything is written.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    copy_of(model, tmp_path / "my model")
    (tmp_path / "link").symlink_to("my model")
    assert run("convert_hf_to_megatron", "link", "~/a b/out") == 0
    corruptions.shutil.rmtree(tmp_path / "a b" / "out" / "hf")
    assert run("convert_megatron_to_hf", "./a b/out", "back", "--hf-config=~/my model") == 0
    assert run("compare_checkpoints", "back", "~/link") == 0
    (tmp_path / "dangling").symlink_to("nowhere")
    assert run("convert_hf_to_megatron", "link", "dangling") == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a b",
        "back",
        "dangling",
        "link",
        "my model",
    ]


def test_other_pickles_are_not_weights(model, tmp_path, capsys):
    """training_args.bin next to pytorch_model.bin is not read as weights, nor alone."""
    folder = copy_of(model, tmp_path / "hf")
    tensors = {
        name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()
    }
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "training_args.bin").write_bytes(b"no tensors")
    assert run("convert_hf_to_megatron", folder, tmp_path / "out") == 2
    assert "has no .safetensors files" in capsys.readouterr().err
    torch.save(tensors, folder / "pytorch_model.bin")
    assert run("convert_hf_to_megatron", folder, tmp_path / "out", "--trust-pickle") == 0
    assert run("compare_checkpoints", model / "hf", tmp_path / "out") == 0


def test_values_that_a_type_cannot_hold_are_an_error(model, tmp_path, capsys):
    """float16 ends at 65504; a larger value is an error with its tensor's name, not written as
    infinity.
    """
    folder = copy_of(model, tmp_path / "hf")
    path = next(
        path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path)
    )
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, path)
    for tool in ("convert_hf_to_megatron", "convert_megatron_to_hf"):
        assert run(tool, folder, tmp_path / "out", "--dtype", "float16") == 2
        assert "tensor model.norm.weight" in (err := capsys.readouterr().err) and "float16" in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
def test_a_reader_that_stops_early_and_warnings_of_megatron_are_not_shown(model):
    """Neither a tool's output into head nor megatron-core's remarks on what is not installed leave
    a line on stderr. In real processes: the end of one is part of it.
    """
    import subprocess

    done = subprocess.run(
        [sys.executable, TOOLS / "inspect_checkpoint.py", model / "megatron"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Megatron distributed checkpoint") and done.stderr == ""
    program = (
        "import sys; sys.path.append(sys.argv[1]); from checkpoint_tools import exit_status\n"
        "sys.exit(exit_status(lambda: print('x\\n' * 200000)))"
    )
    command = [
        "bash",
        "-c",
        '"$@" | head -1; exit ${PIPESTATUS[0]}',
        "-",
        sys.executable,
        "-c",
        program,
        TOOLS,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x\n", "")
