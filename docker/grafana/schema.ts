// Grafana's types, combined into one for a whole dashboard: the panels that these dashboards use, with their options and
// field settings, and a Prometheus query, for which the package has no type.
import * as common from '@grafana/schema';
import * as raw from '@grafana/schema/dist/esm/raw/dashboard/x/dashboard_types.gen';
import * as bargauge from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import * as statetimeline from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import * as text from '@grafana/schema/dist/esm/raw/composable/text/panelcfg/x/TextPanelCfg_types.gen';
import * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import * as xychart from '@grafana/schema/dist/esm/raw/composable/xychart/panelcfg/x/XYChartPanelCfg_types.gen';

interface PrometheusQuery {
  datasource?: raw.DataSourceRef;
  editorMode?: 'code' | 'builder';
  exemplar?: boolean;
  expr: string;
  format?: 'time_series' | 'table' | 'heatmap';
  hide?: boolean;
  instant?: boolean;
  interval?: string;
  legendFormat?: string;
  queryType?: string;
  range?: boolean;
  refId: string;
}

interface FieldConfigSource<Custom> extends Omit<raw.FieldConfigSource, 'defaults'> {
  defaults: Omit<raw.FieldConfig, 'custom'> & { custom?: Custom };
}

// Grafana fills in missing panel options, so none is required.
interface Panel<Type extends string, Options, Custom>
  extends Omit<raw.Panel, 'type' | 'options' | 'fieldConfig' | 'targets'> {
  type: Type;
  options?: Partial<Options>;
  fieldConfig?: FieldConfigSource<Custom>;
  targets?: PrometheusQuery[];
}

// xychart's series type has its own copy of MatcherConfig, of which a schema can have only one.
interface XYOptions extends Omit<xychart.Options, 'series'> {
  series: { x?: { matcher: raw.MatcherConfig } }[];
}

type None = Record<string, never>;

type AnyPanel =
  | Panel<'bargauge', bargauge.Options, None>
  | Panel<'stat', stat.Options, None>
  | Panel<'state-timeline', statetimeline.Options, Partial<statetimeline.FieldConfig>>
  | Panel<'text', text.Options, None>
  | Panel<'timeseries', timeseries.Options, Partial<timeseries.FieldConfig>>
  | Panel<'xychart', XYOptions, Partial<xychart.FieldConfig>>;

interface Row extends Omit<raw.RowPanel, 'panels'> {
  panels: AnyPanel[];
}

interface Mark extends Omit<raw.AnnotationQuery, 'target'> {
  target?: PrometheusQuery;
}

export interface Dashboard extends Omit<raw.Dashboard, 'panels' | 'annotations'> {
  panels?: Array<AnyPanel | Row>;
  annotations?: { list?: Mark[] };
}
