# On every host: ~/llm_jax becomes what was copied, in an environment of its own that is kept from one time to the next.
set -eu
rm -rf "$HOME/llm_jax.new"
mkdir "$HOME/llm_jax.new"
tar -xzf "$HOME/llm_jax.tar.gz" -C "$HOME/llm_jax.new"
[ ! -e "$HOME/llm_jax/.venv" ] || mv "$HOME/llm_jax/.venv" "$HOME/llm_jax.new/"
rm -rf "$HOME/llm_jax"
mv "$HOME/llm_jax.new" "$HOME/llm_jax"
cd "$HOME/llm_jax"
PATH=$HOME/.local/bin:$PATH
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh # the images' own Python is too old
uv venv --quiet --allow-existing --python "$python"
uv pip install --quiet --python .venv/bin/python -e ".[$extras]"
