//! The baseline.

use gptq_core::rtn;

use super::{
    LayerSummary, QuantizeOptions, QuantizeReport, original::Original, plan::Plan, record::Finished,
    store::Store,
};
use crate::{LlamaConfig, LlamaError, Module, Watch, WeightSource, progress::Reporter};

pub(super) fn round_to_nearest(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    options: &QuantizeOptions,
    watch: &mut Watch<'_>,
    store: &mut dyn Store,
) -> Result<QuantizeReport, LlamaError> {
    let span = tracing::info_span!("round_to_nearest", layers = config.layers);
    let _guard = span.enter();
    let plan = Plan::new(config, options)?;
    let mut reporter = Reporter::new(watch, config.layers, plan.quantizes_lm_head(), Module::ALL.len());
    let mut report = QuantizeReport::empty(plan.skipped().to_vec());
    for layer in plan.layers(config) {
        let Some(gptq) = plan.get(layer) else { continue };
        let part = Module::ALL.iter().position(|&module| module == layer.module);
        let done = (layer.layer, (part.unwrap_or(Module::ALL.len() - 1) + 1) as f64);
        if let Some(summary) = store.finished(layer) {
            report.layers.push(summary.clone());
            reporter.skip(done);
            continue;
        }
        let original = Original::read(source, layer.linear(config))?;
        let result = rtn(original.weight().view(), gptq).map_err(|error| original.failed(error))?;
        let packed = original.pack(&result, gptq)?;
        let summary = LayerSummary { memory: reporter.memory(), ..LayerSummary::new(layer, result.report) };
        report.layers.push(summary.clone());
        store.put(Finished { packed, scales: result.scales, summary: summary.clone() })?;
        reporter.finished(done, &summary)?;
    }
    report.finish(&reporter);
    Ok(report)
}
