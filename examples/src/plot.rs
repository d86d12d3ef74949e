//! A plot of losses, as SVG.

use std::fmt::Write as _;

use gptq_llama::{Module, QuantizeReport};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 480.0;
/// Left, right, top, bottom.
const MARGINS: [f64; 4] = [70.0, 150.0, 40.0, 50.0];
/// Okabe and Ito's colours, which colour-blind readers can tell apart; one a module.
const COLOURS: [&str; 8] =
    ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#999999"];

/// A point of a line: decoder layer, loss.
type Point = (usize, f64);

/// The loss of every module over the layers on a logarithmic scale, GPTQ's as a line, and dashed what rounding to nearest
/// would have lost.
pub fn losses(report: &QuantizeReport) -> String {
    let modules: Vec<Module> = Module::ALL.into_iter().chain([Module::LmHead]).collect();
    let line = |module: Module, rounded: bool| -> Vec<Point> {
        let layers = report.layers.iter().filter(|summary| summary.layer.module == module);
        let loss = layers.filter_map(|summary| {
            let loss = if rounded { summary.rtn_loss } else { summary.report.loss };
            loss.filter(|loss| loss.is_finite() && *loss > 0.0).map(|loss| (summary.layer.layer, loss))
        });
        loss.collect()
    };
    let lines: Vec<(Module, Vec<Point>, Vec<Point>)> =
        modules.into_iter().map(|module| (module, line(module, false), line(module, true))).collect();
    draw(&lines)
}

fn draw(lines: &[(Module, Vec<Point>, Vec<Point>)]) -> String {
    let points = || lines.iter().flat_map(|(_, gptq, rtn)| gptq.iter().chain(rtn));
    let decade = |extreme: fn(f64, f64) -> f64, start: f64| {
        points().map(|&(_, loss)| loss.log10()).fold(start, extreme)
    };
    let (low, high) = match points().next() {
        Some(_) => (decade(f64::min, f64::MAX).floor(), decade(f64::max, f64::MIN).ceil()),
        None => (0.0, 1.0),
    };
    let high = high.max(low + 1.0);
    let last = points().map(|&(layer, _)| layer).max().unwrap_or(0).max(1);
    let [left, right, top, bottom] = MARGINS;
    let x = |layer: f64| left + (WIDTH - left - right) * layer / last as f64;
    let y = |log: f64| HEIGHT - bottom - (HEIGHT - top - bottom) * (log - low) / (high - low);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{left}\" y=\"24\" font-size=\"14\">Loss by layer: GPTQ (lines), round to nearest (dashed)</text>\n"
    );
    for decade in low as i32..=high as i32 {
        let y = y(f64::from(decade));
        push(
            &mut svg,
            &format!(
                "<line x1=\"{left}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">1e{decade}</text>",
                WIDTH - right,
                left - 8.0,
                y + 4.0
            ),
        );
    }
    let step = last.div_ceil(16);
    for layer in (0..=last).step_by(step) {
        let (x, y) = (x(layer as f64), HEIGHT - bottom + 18.0);
        push(&mut svg, &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{layer}</text>"));
    }
    push(
        &mut svg,
        &format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">decoder layer</text>",
            (left + WIDTH - right) / 2.0,
            HEIGHT - 10.0
        ),
    );
    let mut row = 0.0;
    for ((module, gptq, rtn), colour) in lines.iter().zip(COLOURS) {
        if gptq.is_empty() && rtn.is_empty() {
            continue;
        }
        for (points, dash) in [(gptq, ""), (rtn, " stroke-dasharray=\"5 4\"")] {
            let place = |&(layer, loss): &Point| format!("{:.1},{:.1}", x(layer as f64), y(loss.log10()));
            let path: Vec<String> = points.iter().map(place).collect();
            push(
                &mut svg,
                &format!(
                    "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"{dash}/>",
                    path.join(" ")
                ),
            );
            for point in &path {
                let (x, y) = point.split_once(',').unwrap_or(("0", "0"));
                push(&mut svg, &format!("<circle cx=\"{x}\" cy=\"{y}\" r=\"2.2\" fill=\"{colour}\"/>"));
            }
        }
        let (from, y) = (WIDTH - right + 14.0, top + 10.0 + 20.0 * row);
        push(
            &mut svg,
            &format!(
                "<line x1=\"{from}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
                from + 22.0,
                from + 28.0,
                y + 4.0,
                module.name().rsplit('.').next().unwrap_or("")
            ),
        );
        row += 1.0;
    }
    svg.push_str("</svg>\n");
    svg
}

fn push(svg: &mut String, element: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(svg, "{element}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lie_where_they_should() {
        let svg = draw(&[
            (Module::Q, vec![(0, 10.0), (1, 1.0)], vec![(0, 100.0), (1, 100.0)]),
            (Module::K, vec![], vec![]),
        ]);
        // Two decades on 390 points of height, two layers on 680 of width.
        assert!(svg.contains("<polyline points=\"70.0,235.0 750.0,430.0\""), "{svg}");
        assert!(svg.contains("<polyline points=\"70.0,40.0 750.0,40.0\""), "{svg}");
        assert!(svg.contains(">q_proj</text>") && !svg.contains(">k_proj</text>"));
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(draw(&[]).ends_with("</svg>\n"));
    }
}
