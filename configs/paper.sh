#!/usr/bin/env bash
# The commands behind every number and figure of the paper, in order.
#
#   configs/paper.sh --dry-run               # list them with their expected times; nothing runs
#   configs/paper.sh                         # run all, about 12 days; what is there already is skipped
#   configs/paper.sh train_anml anml         # run these steps only
#   ROOT=/data configs/paper.sh              # Omniglot is in /data/omniglot-py instead of data/
#   GEMCL=/code/GeMCL configs/paper.sh       # a clone of github.com/aminbana/GeMCL, for its weights; without, GeMCL/
#   FONTS=/fonts configs/paper.sh            # docs/results.md says what is in hangul/ and kanji/ there; without, fonts/
#
# Times are for 2 cores with AVX-512. An evaluation of the full protocol learns (18 rates x 10 draws
# + 10 runs) x 2235 classes x 15 images = 6.4 million images one by one, at 600 classes alone 1.7 million.
# Ctrl-C and the same command again goes on where a training or an evaluation stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

ROOT=${ROOT:-data}
GEMCL=${GEMCL:-GeMCL}
FONTS=${FONTS:-fonts}
PYTHON=${PYTHON:-.venv/bin/python}

DRY_RUN=false
WANTED=()
for word in "$@"; do
  case $word in
    --dry-run) DRY_RUN=true ;;
    -*)
      echo "paper.sh: error: no option $word; there is --dry-run" >&2
      exit 2
      ;;
    *) WANTED+=("$word") ;;
  esac
done
STEPS=()   # names of all steps
RESULTS=() # of all steps, for the ledger: name, file, training and command, one after the other
RAN=false  # whether the last step ran

ANML="20,000 steps, second order, seed 9"
FIRST="20,000 steps, first order, seed 9"
FIRST_SEEDS="20,000 steps, first order, seeds 9, 10 and 11"
OML="20,000 steps of OML, second order, seed 9"
OML_84="20,000 steps of OML at 84 x 84, second order, seed 9"
PROTOTYPES="4,000 episodes of configs/prototypes.toml, seed 9"
PROTOTYPES_SEEDS="4,000 episodes of configs/prototypes.toml, seeds 9, 10 and 11"
PRETRAIN="1,680,000 images, i.i.d., seed 9"

among() { [[ " ${*:2} " == *" $1 "* ]]; }
wanted() { [[ ${#WANTED[@]} -eq 0 ]] || among "$1" "${WANTED[@]}"; }
newest() { compgen -G "$1" | sort -V | tail -n 1 || true; }

# A command as it could be typed.
typed() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=+-]+$ ]] || word="'$word'"
    line+="$word "
  done
  echo "${line% }"
}

# step NAME TIME MADE COMMAND...: run COMMAND unless MADE (a pattern, or nothing) is there.
step() {
  local name=$1 time=$2 made=$3 there=""
  shift 3
  RAN=false
  if $LISTING; then
    STEPS+=("$name")
    return
  fi
  wanted "$name" || return 0
  [[ -z $made ]] || there=$(newest "$made")
  echo "# $name: $time${there:+ (skipped: there is $there)}"
  typed "$@"
  if ! $DRY_RUN && [[ -z $there ]]; then
    "$@"
    RAN=true
  fi
}

# train NAME TIME MODEL SCRIPT FLAGS...: a training, which goes on where an earlier attempt stopped. The model
# gets its name only when training came to its end.
train() {
  local name=$1 time=$2 model=$3 folder=runs/paper_$1_0
  shift 3
  local command=("$PYTHON" "$@" --name "paper_$name" --model_name "partial_$model" --dataset-path "$ROOT")
  if [[ -d $folder ]]; then
    command+=(--resume "$folder")
  fi
  step "$name" "$time" "$model" "${command[@]}"
  if $RAN; then
    mv "partial_$model" "$model"
  fi
}

# seeds NAME TIME FLAGS...: trainings of seeds 10 and 11, whose models lie in the run folder; those complete stay.
seeds() {
  local name=$1 time=$2 folder=runs/paper_$1_0
  shift 2
  local command=("$PYTHON" mrcl_classification.py "$@" --seeds 10 11 --name "paper_$name" --dataset-path "$ROOT")
  if [[ -d $folder ]]; then
    command+=(--resume "$folder")
  fi
  step "$name" "$time" "" "${command[@]}"
}

# evaluate NAME TIME TRAINING FLAGS...: an evaluation, which goes on where an earlier attempt stopped.
evaluate() {
  local name=$1 time=$2 training=$3 folder=runs/paper_$1_0
  shift 3
  local command=("$PYTHON" evaluate_classification.py --name "paper_$name" --dataset-path "$ROOT" "$@")
  among --learner "$@" || among --lr "$@" || command+=(--test) # else there is no rate to choose
  RESULTS+=("$name" "$folder/results.csv" "$training" "$(typed "${command[@]}")")
  if [[ -d $folder ]]; then
    command+=(--resume "$folder")
  fi
  step "$name" "$time" "$folder/accuracy.png" "${command[@]}"
}

# keep NAME FILE TRAINING COMMAND...: copy results that results/ lists already or that have a target there, and
# note their origin.
keep() {
  local file
  while [[ $# -gt 0 ]]; do
    file=$(newest "$2")
    if [[ -n $file ]] && grep -q "^$1," results/targets.csv results/manifest.csv; then
      echo "cp $file results/$1.${file##*.}"
      cp "$file" "results/$1.${file##*.}"
      sed -i.before "/^$1,/d" results/manifest.csv
      rm results/manifest.csv.before
      printf '%s,"%s","%s"\n' "$1" "$3" "$4" >> results/manifest.csv
    fi
    shift 4
  done
}

# gemcl: the heads that need no gradient on seven networks of GeMCL, as in its table of Omniglot.
gemcl() {
  local features name model head
  for features in random Pretrain_final MTLR_final PGLR_final Protonet_final MAP_final Bayesian_final; do
    name=$(tr "[:upper:]" "[:lower:]" <<< "gemcl_${features%_final}")
    model=GeMCL_${features%_final}.net
    step "convert_$name" "5 s" "$model" "$PYTHON" -m tools.convert_released \
      "$GEMCL/experiments/omniglot/omniglot_$features/check_point" "$model"
    for head in ncm map predictive; do
      evaluate "${name}_$head" "2 to 4 min" "GeMCL's released weights (omniglot_$features)" \
        --config configs/gemcl_omniglot.toml --model "$model" --learner "$head"
    done
  done
}

# thousands CHARACTERS NAME TRAINING MODEL FLAGS...: a model learns the characters that fonts draw, with three heads.
thousands() {
  local ROOT=$FONTS/$1 result=$1_$2 training=$3
  local flags=(--config configs/thousands.toml --characters "$1" --model "$4" "${@:5}")
  evaluate "${result}_ncm" "2 to 5 min" "$training" "${flags[@]}" --learner ncm
  if [[ $2 == *prototypes ]]; then
    evaluate "${result}_map" "2 to 5 min" "$training" "${flags[@]}" --learner map
    evaluate "${result}_slda" "3 to 6 min" "$training" "${flags[@]}" --learner slda --features gated
  else
    evaluate "${result}_slda" "5 to 8 min" "$training" "${flags[@]}" --learner slda
    evaluate "$result" "4 to 7 min" "$training" "${flags[@]}" --lr 0.001 --runs 1
  fi
}

# fonts: models of Omniglot, and models of one half of Hangul, on Hangul (the latter on its other half) and kanji.
fonts() {
  local ROOT=$FONTS/hangul steps="3,000 steps on Hangul, second order, seed 9"
  local episodes="2,400 episodes of configs/prototypes.toml with --augment 1 on Hangul, seed 9"
  local data=(--dataset fonts --characters hangul) other_half=(--evaluation_classes 1175 --schedule 10 100 600 1000)
  train train_hangul_anml "30 min" Hangul_Model.net mrcl_classification.py --config configs/anml.toml \
    --steps 3000 --num_classes 1175 "${data[@]}"
  train train_hangul_prototypes "1 h" Hangul_Prototypes.net mrcl_classification.py --config configs/prototypes.toml \
    --steps 2400 --augment 1 "${data[@]}"
  local characters
  for characters in hangul kanji; do
    thousands $characters anml "$ANML" Neuromodulation_Model.net
    thousands $characters prototypes "$PROTOTYPES" Prototypes_Model.net
  done
  thousands hangul fonts_anml "$steps" Hangul_Model.net "${other_half[@]}"
  thousands hangul fonts_prototypes "$episodes" Hangul_Prototypes.net "${other_half[@]}"
  thousands kanji fonts_anml "$steps" Hangul_Model.net
  thousands kanji fonts_prototypes "$episodes" Hangul_Prototypes.net
}

paper() {
  # Models.
  train train_anml "2.5 to 4 h" Neuromodulation_Model.net \
    mrcl_classification.py --config configs/anml.toml --keep_every 2000
  train train_anml_first_order "1.6 to 3 h" Neuromodulation_Model_first_order.net \
    mrcl_classification.py --config configs/anml_first_order.toml --keep_every 2000
  seeds train_anml_first_order_seeds "2.5 to 4 h" --config configs/anml_first_order.toml
  train train_oml "6 to 15 h" OML_Model.net mrcl_classification.py --config configs/oml.toml --keep_every 2000
  train train_oml_84 "10 h" OML_84.net mrcl_classification.py --config configs/oml.toml --size 84 --keep_every 2000
  train train_prototypes "1.2 to 2 h" Prototypes_Model.net mrcl_classification.py --config configs/prototypes.toml
  seeds train_prototypes_seeds "2.4 to 4 h" --config configs/prototypes.toml
  train train_pretrain "less than 23 h" Pretrain_Model.net mrcl_classification.py --learner iid --steps 20000

  # Treatments. Learning rates are chosen by test accuracy (--test), as the released code reports it;
  # anml_blind chooses on meta-training classes instead.
  evaluate anml "1 to 4 h" "$ANML" --model Neuromodulation_Model.net --treatment-preset ANML --track_every 50
  evaluate anml_blind "1 to 4 h" "$ANML" --model Neuromodulation_Model.net --treatment-preset ANML \
    --lr_search_split background
  evaluate anml_first_order "1 to 4 h" "$FIRST" --model Neuromodulation_Model_first_order.net --treatment-preset ANML
  local first_order=(Neuromodulation_Model_first_order.net
    runs/paper_train_anml_first_order_seeds_0/seed_{10,11}.net)
  evaluate anml_first_order_seeds "0.5 h" "$FIRST_SEEDS" --model "${first_order[@]}" --lr 0.001
  evaluate anml_ft_pln "23 h" "$ANML" --model Neuromodulation_Model.net --treatment-preset ANML-FT:PLN
  evaluate anml_ft_pln_nm_out "27 h" "$ANML" --model Neuromodulation_Model.net \
    --treatment-preset ANML-FT:PLN+NM-out
  evaluate anml_unlimited "a day" "$ANML" --model Neuromodulation_Model.net --treatment-preset ANML-Unlimited
  evaluate oml "6 h" "$OML" --model OML_Model.net --treatment-preset OML
  evaluate oml_olft "2 h" "$OML" --model OML_Model.net --treatment-preset OML-OLFT
  evaluate oml_84 "2.2 h, at 600 classes alone" "$OML_84" --model OML_84.net --treatment-preset OML --schedule 600
  evaluate oml_84_olft "2 h" "$OML_84" --model OML_84.net --treatment-preset OML-OLFT
  evaluate oml_unlimited "25 h, at 600 classes alone" "$OML" --model OML_Model.net \
    --treatment-preset OML-Unlimited --schedule 600
  evaluate pretrain "6 h" "$PRETRAIN" --model Pretrain_Model.net --treatment-preset Pretrain
  evaluate scratch "10 h, at 600 classes alone" "none" --treatment-preset Scratch --schedule 600

  # Heads that need no gradient.
  evaluate anml_ncm "5 min" "$ANML" --model Neuromodulation_Model.net --learner ncm
  evaluate anml_map "5 min" "$ANML" --model Neuromodulation_Model.net --learner map
  evaluate anml_slda_gated "10 min" "$ANML" --model Neuromodulation_Model.net --learner slda --features gated
  evaluate anml_ncm_power_1 "1 min" "$ANML" --model Neuromodulation_Model.net --learner ncm --power 1 --nested
  evaluate anml_slda_gated_power_1 "2 min" "$ANML" --model Neuromodulation_Model.net --learner slda \
    --features gated --power 1 --nested
  evaluate anml_slda "20 min" "$ANML" --model Neuromodulation_Model.net --learner slda
  evaluate anml_first_order_ncm "1 min" "$FIRST" --model Neuromodulation_Model_first_order.net \
    --learner ncm --nested
  evaluate anml_first_order_map "2 min" "$FIRST" --model Neuromodulation_Model_first_order.net \
    --learner map --nested
  evaluate anml_first_order_slda_gated "2 min" "$FIRST" --model Neuromodulation_Model_first_order.net \
    --learner slda --features gated --nested
  evaluate anml_first_order_slda "10 min" "$FIRST" --model Neuromodulation_Model_first_order.net \
    --learner slda --nested
  evaluate anml_prototypes_ncm "5 min" "$PROTOTYPES" --model Prototypes_Model.net --learner ncm --nested
  evaluate anml_prototypes_slda "10 min" "$PROTOTYPES" --model Prototypes_Model.net --learner slda \
    --features gated --nested
  evaluate anml_prototypes_map "2 min" "$PROTOTYPES" --model Prototypes_Model.net --learner map --nested
  evaluate anml_prototypes_map_power_1 "2 min" "$PROTOTYPES" --model Prototypes_Model.net --learner map --power 1 \
    --nested
  evaluate anml_prototypes_slda_both "10 min" "$PROTOTYPES" --model Prototypes_Model.net \
    --learner slda --nested

  local three=(Prototypes_Model.net runs/paper_train_prototypes_seeds_0/seed_{10,11}.net)
  evaluate anml_prototypes_seeds_ncm "5 min" "$PROTOTYPES_SEEDS" --model "${three[@]}" --learner ncm --nested
  evaluate anml_prototypes_seeds_map_power_1 "5 min" "$PROTOTYPES_SEEDS" --model "${three[@]}" \
    --learner map --power 1 --nested
  evaluate anml_prototypes_seeds_slda "10 min" "$PROTOTYPES_SEEDS" --model "${three[@]}" --learner slda \
    --features gated --nested

  # GeMCL's released weights, which have no licence and are not part of this project.
  if $LISTING || $DRY_RUN || [[ -d $GEMCL ]]; then
    gemcl
  else
    echo "# gemcl: skipped: there is no $GEMCL, a clone of github.com/aminbana/GeMCL"
  fi

  # Beyond 600 classes: characters of fonts, which are not part of this project.
  if $LISTING || $DRY_RUN || [[ -d $FONTS ]]; then
    fonts
  else
    echo "# fonts: skipped: there is no $FONTS with hangul/ and kanji/"
  fi

  # Oracles: the same on a shuffled stream.
  evaluate anml_oracle_1 "4 h" "$ANML" --model Neuromodulation_Model.net --treatment-preset ANML-Oracle
  evaluate anml_oracle "21 h, at 600 classes alone" "$ANML" --model Neuromodulation_Model.net \
    --treatment-preset ANML-Oracle --epoch 20 --schedule 600
  evaluate pretrain_oracle "31 h, at 600 classes alone" "$PRETRAIN" --model Pretrain_Model.net \
    --treatment-preset Pretrain-Oracle --epoch 20 --schedule 600
  evaluate scratch_oracle "21 h, at 600 classes alone, one draw to search and 3 runs" "none" \
    --treatment-preset Scratch-Oracle --epoch 20 --schedule 600 --lr_search_runs 1 --runs 3

  # Accuracy against meta-steps: the models kept on the way.
  local order
  for order in anml anml_first_order; do
    evaluate "${order}_on_the_way" "15 min" "every 2,000 steps of train_$order" \
      --model "runs/paper_train_${order}_0/model_"{2000..20000..2000}.net \
      --schedule 50 200 --lr 0.001 --runs 3
  done
  for order in oml oml_84; do
    evaluate "${order}_on_the_way" "15 min" "every 2,000 steps of train_$order" \
      --model "runs/paper_train_${order}_0/model_"{2000..20000..2000}.net \
      --treatment-preset OML-OLFT --schedule 50 200 --lr 0.0006 --runs 3
  done

  # The representation: active and dead units, KNN, pictures; of unseen classes, and of those of meta-training.
  local of seen
  for of in "" _first_order; do
    for seen in "" _background; do
      local result=representation$of$seen training=${of:+$FIRST}
      local analysis=("$PYTHON" -m tools.analyze_representation --model "Neuromodulation_Model$of.net"
        --name "paper_$result" --dataset-path "$ROOT")
      [[ -z $seen ]] || analysis+=(--classes background --train_images 6)
      RESULTS+=("$result" "runs/paper_${result}_[0-9]*/representation.json" "${training:-$ANML}" "$(typed "${analysis[@]}")")
      step "$result" "1 min" "runs/paper_${result}_[0-9]*/embedding.png" "${analysis[@]}"
    done
  done

  # Figures, comparisons and the table in docs/results.md: quick, so never skipped.
  step figure_sequence "5 s" "" "$PYTHON" -m tools.plot_results --name sequence \
    ANML=runs/paper_anml_0 OML=runs/paper_oml_0 OML-OLFT=runs/paper_oml_olft_0 \
    Pretrain=runs/paper_pretrain_0
  step figure_fine_tuning "5 s" "" "$PYTHON" -m tools.plot_results --name fine_tuning \
    ANML=runs/paper_anml_0 ANML-FT:PLN=runs/paper_anml_ft_pln_0 \
    ANML-FT:PLN+NM-out=runs/paper_anml_ft_pln_nm_out_0 ANML-Unlimited=runs/paper_anml_unlimited_0
  step figure_order "5 s" "" "$PYTHON" -m tools.plot_results --name order \
    ANML=runs/paper_anml_0 "ANML, first order=runs/paper_anml_first_order_0"
  step figure_training "5 s" "" "$PYTHON" -m tools.plot_results --name training --against steps \
    "ANML, second order=runs/paper_anml_on_the_way_0" \
    "ANML, first order=runs/paper_anml_first_order_on_the_way_0"
  step figure_oml "5 s" "" "$PYTHON" -m tools.plot_results --name oml --against steps \
    "OML, 28 x 28=runs/paper_oml_on_the_way_0" "OML, 84 x 84=runs/paper_oml_84_on_the_way_0"
  step figure_heads "5 s" "" "$PYTHON" -m tools.plot_results --name heads --no-published \
    "streaming LDA=runs/paper_anml_slda_0" "streaming LDA, gated=runs/paper_anml_slda_gated_0" \
    GeMCL-MAP=runs/paper_anml_map_0 "nearest class mean=runs/paper_anml_ncm_0" Adam=runs/paper_anml_0
  step figure_final "5 s" "" "$PYTHON" -m tools.plot_results --name final \
    "ANML-Oracle, 20 epochs=runs/paper_anml_oracle_0" ANML-Oracle=runs/paper_anml_oracle_1_0 \
    ANML=runs/paper_anml_0 OML=runs/paper_oml_0 OML-OLFT=runs/paper_oml_olft_0 \
    ANML-FT:PLN=runs/paper_anml_ft_pln_0 ANML-FT:PLN+NM-out=runs/paper_anml_ft_pln_nm_out_0 \
    "Scratch-Oracle, 20 epochs=runs/paper_scratch_oracle_0" \
    "Pretrain-Oracle, 20 epochs=runs/paper_pretrain_oracle_0" \
    Scratch=runs/paper_scratch_0 Pretrain=runs/paper_pretrain_0 OML-Unlimited=runs/paper_oml_unlimited_0
  step compare_oml "1 s" "" "$PYTHON" -m tools.compare_results runs/paper_anml_0 runs/paper_oml_0
  step compare_oml_olft "1 s" "" "$PYTHON" -m tools.compare_results runs/paper_anml_0 runs/paper_oml_olft_0
  if ! $LISTING && ! $DRY_RUN && wanted ledger; then
    keep "${RESULTS[@]}"
  fi
  step ledger "1 s" "" "$PYTHON" -m tools.ledger
}

LISTING=true # this pass only learns the steps' names
paper
for name in ${WANTED[@]+"${WANTED[@]}"}; do
  if ! among "$name" "${STEPS[@]}"; then
    echo "paper.sh: error: no step $name; there are ${STEPS[*]}" >&2
    exit 2
  fi
done
LISTING=false
RESULTS=()
paper
